"""The log of a run: the numbers of its steps, summed as they come and written as one line of means.

Two files lie in the stage's folder, both in the format of utils/log.py: `log.txt`, and with experts
`experts.txt`, the share of each layer's assignments that each expert got (`L0E3`: layer 0, expert 3).
"""

import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

from utils.log import RunLog

EXPERT = re.compile(r"L\d+E\d+")


class StepLog:
    """Sums numbers and writes means. Only the first process calls `open`, and nothing is written before."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.window: dict[str, float] = {}  # sums since the last line
        self.pending: list[tuple] = []  # names and values to add; tensors may still be computed
        self.log = self.experts = None
        self.positions = [None, None]  # in the two files, if a checkpoint has them

    def open(self) -> None:
        """Start the files, or truncate them to where the checkpoint was made."""
        if self.positions[1] is None:
            (self.folder / "experts.txt").unlink(missing_ok=True)
        self.log = RunLog(self.folder / "log.txt", resume_at=self.positions[0])

    def note(self, values: dict[str, float], waited: float, took: float) -> None:
        """Add one step (times in seconds); a skipped one has no values. Tensors are fetched later."""
        times = {"data_ms": waited * 1e3, "step_ms": took * 1e3, "steps": 1, "taken": int(bool(values))}
        self.pending += (values | times).items()

    def fetch(self) -> dict[str, float]:
        """Return the sums since the last line. All tensors leave the GPU in one message."""
        tensors = [value for _, value in self.pending if isinstance(value, torch.Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())
        for name, value in self.pending:
            number = next(numbers) if isinstance(value, torch.Tensor) else value
            self.window[name] = self.window.get(name, 0.0) + number
        self.pending = []
        return self.window

    def write(self, place: dict, lr: float, tokens_per_step: float, skipped: int) -> None:
        """Write one line: the means of the steps since the last one. `place`: step, tokens, epoch."""
        window, self.window = self.fetch(), {}
        steps, taken = window.pop("steps"), window.pop("taken")
        mean = {name: value / (steps if name.endswith("_ms") else taken) for name, value in window.items()}
        loads = {name: mean.pop(name) for name in list(mean) if EXPERT.fullmatch(name)}
        times = {name: mean.pop(name) for name in ("data_ms", "step_ms")}
        row = place | {name: mean[name] for name in ("loss", "ce", "mtp", "balance") if name in mean}
        if "ce" in mean:
            row["ppl"] = math.exp(min(mean["ce"], 700.0))
        row |= {name: value for name, value in mean.items() if name not in row}
        row |= {"lr": lr, "tok_s": tokens_per_step / times["step_ms"] * 1e3, **times}
        if skipped:
            row["skipped"] = skipped
        self.write_row(row)
        if self.log and loads:
            if self.experts is None:
                self.experts = RunLog(self.folder / "experts.txt", resume_at=self.positions[1])
            self.experts.write({"step": place["step"], **loads})

    def write_row(self, row: dict) -> None:
        """Write a line as it is, such as that of an evaluation."""
        if self.log:
            self.log.write(row)

    def state_dict(self) -> dict:
        """Return the state that continues the log byte by byte."""
        positions = [self.log.position, self.experts.position if self.experts else self.positions[1]]
        return {"window": dict(self.fetch()), "positions": positions}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint; call before `open`."""
        self.window, self.positions = dict(state["window"]), list(state["positions"])

    def close(self) -> None:
        """Close the files."""
        for log in filter(None, (self.log, self.experts)):
            log.close()


def progress_bar(run) -> tqdm:
    """Return a bar for `run`, a `Trainer`, that is closed by `with`."""
    style = "{percentage:3.0f}%|{bar:24}| {desc}  {remaining} left"
    shown = None if run.machine.world.is_first else True  # None: on a terminal only
    return tqdm(total=1.0, initial=run.progress, disable=shown, leave=False, bar_format=style)


def show(bar: tqdm, run) -> None:
    """Redraw the bar: share of the run, and loss and speed since the last log line."""
    if not bar.disable:
        window = run.log.fetch()
        loss = window.get("loss", 0) / max(1, window["taken"])
        speed = run.tokens / run.step / (window["step_ms"] / window["steps"]) * 1e3
        bar.n = run.progress
        bar.set_description_str(f"step {run.step}  loss {loss:.3f}  {speed:,.0f} tok/s")
