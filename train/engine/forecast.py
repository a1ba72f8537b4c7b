"""Forecast a run from its own first steps, and compare the forecast with the outcome.

    seconds of a step = median of the measured steps, plus evaluations and checkpoints, spread over all steps
    steps to come     = those left until max_steps, or those that fit into the remaining time, if fewer
    end               = seconds so far + steps to come * seconds of a step + last evaluation and checkpoint

The first steps of a process are slow and are not measured. Memory is the peak so far, and what the longest
rows of the run keep for the backward pass beyond those so far: attention grows with their length.
"""

import statistics
import sys
from typing import NamedTuple

import torch

from config.schema import RunConfig, TrainConfig
from utils.activations import MicroBatch, kept_bytes, recompute_bytes
from utils.cost import size

SLOW = 5  # steps that are not measured
STEPS, SECONDS = 25, 3.0  # measured at least; fewer seconds suffice once a tenth of the run is over
SAVING = 12 / 200e6  # seconds to save a parameter: three fp32 numbers (with two moments) at 200 MB/s


class Costs(NamedTuple):
    """The cost of the parts of a run, in seconds."""

    step: float
    evaluation: float  # of all held-out data
    batches: int  # of that evaluation
    saving: float  # of one checkpoint
    epochs: float = 0.0  # per step, if every epoch ends with such an evaluation, else 0


class Forecast:
    """The forecast of `run`, a `Trainer`: call `note()` after each step and `compare()` at the end."""

    def __init__(self, run):
        self.run = run
        self.count, self.marks = 0, []  # steps of this process; (step, seconds) pairs to measure between
        self.made = None  # steps, seconds and bytes at the end of the run

    def note(self) -> None:
        """Count a step. After enough steps, make the forecast and print it, once."""
        run, self.count = self.run, self.count + 1
        waiting = run.lazy and run.step % run.config.train.log_every  # the GPU may still be computing
        if self.made or waiting or self.count < SLOW:
            return
        self.marks.append((run.step, run.elapsed))
        long = run.elapsed - self.marks[0][1] >= SECONDS or run.progress >= 0.1
        if self.count < SLOW + STEPS or len(self.marks) < 2 or not long:
            return
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        step = statistics.median((late - soon) / (b - a) for (a, soon), (b, late) in pairs)
        epochs = run.stage.source.epoch_progress / run.step if run.stage.keep_best else 0.0
        saving = SAVING * sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        costs = Costs(step, run.held_out.reserve, run.stage.evaluate.batches, saving, epochs)
        end = end_of_run(run.config.train, run.step, run.elapsed, costs)
        growth = 0
        if run.config.data.start_length:  # pre-training: its source reads a loader with rows that grow
            length, machine = run.stage.source.loader.length, run.machine
            growth = longest_rows(run.config, length, machine.dtype.itemsize, machine.device.type)
        self.made = *end, *(peak + growth for peak in peak_memory(run.machine.device))
        longer = ", which longer rows will make slower" if run.config.data.start_length else ""
        pairs = zip(WRITE[: len(self.made)], self.made, strict=True)
        texts = ", ".join(write(number) for write, number in pairs)
        run.machine.say(f"forecast after {self.count} steps of {step * 1e3:.0f} ms{longer}: {texts}")

    def compare(self) -> None:
        """Print the prediction beside the measurement."""
        if self.made:
            now = self.run.step, self.run.elapsed, *peak_memory(self.run.machine.device)
            texts = [f"{write(told)}, measured {write(got)} ({got / told - 1:+.1%})"
                     for write, told, got in zip(WRITE[: len(now)], self.made, now, strict=True)]  # fmt: skip
            self.run.machine.say("predicted " + "; ".join(texts))


def end_of_run(train: TrainConfig, step: int, elapsed: float, costs: Costs) -> tuple[float, float]:
    """Return steps and seconds at the end of a run that is at `step` after `elapsed` seconds."""
    evaluations = min(1.0, train.eval_batches / costs.batches) / train.eval_every + costs.epochs
    each = costs.step + costs.evaluation * evaluations + costs.saving / train.save_every
    left = [train.max_steps - step] if train.max_steps else []
    left += [(train.max_seconds - costs.evaluation - elapsed) / each] if train.max_seconds else []
    steps = max(0.0, min(left))
    return step + steps, elapsed + steps * each + costs.evaluation + costs.saving


def longest_rows(config: RunConfig, length: int, wide: int, device: str) -> int:
    """Return the bytes that the longest rows keep for the backward pass beyond rows of `length`."""
    rows, longest, kinds = config.train.batch_size, config.data.sequence_length, (kept_bytes, recompute_bytes)
    checkpointed = config.train.gradient_checkpointing
    batches = (MicroBatch(rows * longest // T, T, wide, device, checkpointed) for T in (length, longest))
    now, then = (max(count(config.model, batch, matrices=0) for count in kinds) for batch in batches)
    return then - now


def peak_memory(device: torch.device) -> list[int]:
    """Return the peak bytes so far, of tensors on a GPU, else of the process; empty on Windows."""
    if device.type == "cuda":
        return [torch.cuda.max_memory_allocated(device)]
    if sys.platform == "win32":
        return []
    import resource

    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)]


def duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    unit, name = (1, "seconds") if seconds < 120 else (60, "minutes") if seconds < 7200 else (3600, "hours")
    return f"{seconds / unit:.1f} {name}"


# How to print the numbers of a forecast; on Windows it has no third one.
WRITE = "{:,.0f} steps".format, duration, lambda count: f"{size(count)} of memory"
