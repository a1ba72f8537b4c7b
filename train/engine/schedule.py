"""The learning-rate schedule: warmup, then decay along the progress of the run.

Progress runs from 0 to 1, in steps or in seconds, whichever bound is nearer. A run that is bounded by time
therefore decays completely even on a slow machine.

    cosine       min + (1 - min) (1 + cos(pi p)) / 2
    exponential  min^p
    wsd          1, then linearly down to min over the last `decay_fraction`   (arXiv 2404.06395)
"""

import math

from config.schema import OptimConfig


def progress(step: int, max_steps: int | None, elapsed=0.0, max_seconds: float | None = None) -> float:
    """Return the completed share of the run, 0 to 1: by steps or by time, whichever is larger."""
    by_steps = step / max_steps if max_steps else 0.0
    by_time = elapsed / max_seconds if max_seconds else 0.0
    return min(1.0, max(by_steps, by_time))


def lr_factor(optim: OptimConfig, step: int, done: float) -> float:
    """Return the factor that multiplies all learning rates. It is never 0 during warmup.

    `step` counts from 0 at the beginning of the warmup; `done` is the progress of the run.
    """
    warmup = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    low = optim.min_lr_ratio
    if optim.schedule == "cosine":
        decay = low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
    elif optim.schedule == "exponential":
        decay = low**done
    else:
        left = min(1.0, (1 - done) / optim.decay_fraction)  # 1 until the decay begins, then down to 0
        decay = low + (1 - low) * left
    return warmup * decay


def begins_to_decay(optim: OptimConfig, before: float, now: float) -> bool:
    """Return whether a wsd schedule leaves its plateau between the progress `before` and that of `now`."""
    return optim.schedule == "wsd" and 1 - before >= optim.decay_fraction > 1 - now > 0
