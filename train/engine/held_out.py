"""Evaluations during a run: their results, their time, and the best weights so far."""

import math
import time

import torch

from train.engine import parallel
from utils import distributed
from utils.checkpoint import load_weights


class HeldOut:
    """Evaluates `run`, a `Trainer`, and remembers the best weights of all epochs."""

    def __init__(self, run):
        self.run = run
        self.last = None  # numbers of the last evaluation
        self.best = None  # of `keep_best`: step, tokens, value, evaluation and weights
        self.measured_at = 0  # the step of the last evaluation on all data
        self.reserve = 0.0  # seconds kept for the last evaluation

    def measure(self, batches: int | None) -> dict[str, float]:
        """Return the results of the stage's evaluation on this many batches (None: all)."""
        run = self.run
        run.model.eval()
        with torch.no_grad(), run.machine.autocast():
            values = run.stage.evaluate(run.model, batches)
        run.model.train()
        return values

    def evaluate(self, batches: int | None) -> None:
        """Measure, log and print; on all data, keep the weights if they are the best so far."""
        run, clock = self.run, time.perf_counter()
        self.last = values = self.measure(batches)
        took = time.perf_counter() - clock
        run.log.write_row({"step": run.step, "tokens": run.tokens, **values, "eval_ms": took * 1e3})
        texts = {name: value if isinstance(value, int) else f"{value:.4f}" for name, value in values.items()}
        shown = "  ".join(f"{name} {text}" for name, text in texts.items())
        run.machine.say(f"step {run.step}  {shown}  ({'part' if batches else 'all'} of the held-out data)")
        if batches:
            self.keep_time(took * max(1.0, run.stage.evaluate.batches / batches))
            return
        self.measured_at = run.step
        if (key := run.stage.keep_best) and values[key] > (self.best or {}).get("value", -math.inf):
            weights = parallel.state_dict(run.model, run.stage.own)
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
            self.best = {"step": run.step, "tokens": run.tokens, "value": values[key],
                         "evaluation": values, "weights": weights}  # fmt: skip

    def keep_time(self, estimate: float) -> None:
        """Reserve time for the last evaluation, at most half of the bound."""
        run = self.run
        estimate = distributed.sum_scalars([estimate])[0] / run.machine.world.size
        half = (run.config.train.max_seconds or math.inf) / 2
        if estimate > half > self.reserve:
            run.machine.say(f"the last evaluation will take about {estimate:.0f} seconds, more than half of "
                            f"train.max_seconds={2 * half:g}: the run will end late")  # fmt: skip
        self.reserve = min(estimate, half)

    def take_best(self) -> None:
        """Restore the weights that did best."""
        run, best = self.run, self.best
        if best and best["step"] != run.step:
            load_weights(run.model, best["weights"], "the best weights", run.stage.own)
            run.step, run.tokens, self.last = best["step"], best["tokens"], best["evaluation"]
            run.machine.say(f"best: step {run.step}, {run.stage.keep_best} {best['value']:.4f}")
