"""The numbers of a run's steps: summed as they come, written as one line of means where a line is due.

Two files lie in the stage's folder, both in the format of utils/log.py: `log.txt`, and with experts
`experts.txt`, the share of each layer's assignments that each expert got (`L0E3`: layer 0, expert 3).
"""

import math
import re
from pathlib import Path

from utils.log import RunLog

EXPERT = re.compile(r"L\d+E\d+")


class StepLog:
    """Nothing is written before `open`, which only the first process calls; the others only sum."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.window: dict[str, float] = {}  # sums since the last line
        self.log = self.experts = None
        self.positions = [None, None]  # of the two files, where a checkpoint says so

    def open(self) -> None:
        """Start the files, or cut them where the checkpoint was made."""
        if self.positions[1] is None:
            (self.folder / "experts.txt").unlink(missing_ok=True)
        self.log = RunLog(self.folder / "log.txt", resume_at=self.positions[0])

    def note(self, values: dict[str, float], waited: float, took: float) -> None:
        """Add one step; a skipped one has times (in seconds), but no values."""
        times = {"data_ms": waited * 1e3, "step_ms": took * 1e3, "steps": 1, "taken": int(bool(values))}
        for name, value in {**values, **times}.items():
            self.window[name] = self.window.get(name, 0.0) + value

    def so_far(self) -> tuple[float, float]:
        """Mean loss and mean milliseconds of the steps since the last line."""
        window = self.window
        return window.get("loss", 0) / max(1, window["taken"]), window["step_ms"] / window["steps"]

    def write(self, place: dict, lr: float, tokens_per_step: float, skipped: int) -> None:
        """One line: the means of the steps since the last one. `place`: step, tokens, epoch."""
        window, self.window = self.window, {}
        steps, taken = window.pop("steps"), window.pop("taken")
        mean = {name: value / (steps if name.endswith("_ms") else taken) for name, value in window.items()}
        loads = {name: mean.pop(name) for name in list(mean) if EXPERT.fullmatch(name)}
        row = place | {name: mean[name] for name in ("loss", "ce", "mtp", "balance") if name in mean}
        if "ce" in mean:
            row["ppl"] = math.exp(min(mean["ce"], 700.0))
        row |= {name: value for name, value in mean.items() if name not in row and not name.endswith("_ms")}
        row |= {"lr": lr, "tok_s": tokens_per_step / (mean["step_ms"] / 1e3)}
        row |= {"data_ms": mean["data_ms"], "step_ms": mean["step_ms"]}
        if skipped:
            row["skipped"] = skipped
        self.write_row(row)
        if self.log and loads:
            if self.experts is None:
                self.experts = RunLog(self.folder / "experts.txt", resume_at=self.positions[1])
            self.experts.write({"step": place["step"], **loads})

    def write_row(self, row: dict) -> None:
        """A line as it is, an evaluation's for one."""
        if self.log:
            self.log.write(row)

    def state_dict(self) -> dict:
        """What a checkpoint needs, for a log that a resumed run continues byte by byte."""
        positions = [self.log.position, self.experts.position if self.experts else self.positions[1]]
        return {"window": dict(self.window), "positions": positions}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint; before `open`."""
        self.window, self.positions = dict(state["window"]), list(state["positions"])

    def close(self) -> None:
        """Close what is open."""
        for log in filter(None, (self.log, self.experts)):
            log.close()
