"""The one training engine: what every stage shares lives here, once.

A stage says what makes it itself (train/engine/stage.py: model, data, loss, evaluation, what it saves). The
engine
does the rest: the gradient proof, accumulation, mixed precision, clipping, schedules, logging, evaluation,
checkpoints, resuming, signals, data parallelism.

One optimizer step:

    1. take all its micro-batches and count their supervised tokens, over all processes
    2. for each: loss = sum over its tokens / count of the whole step;  backward
    3. add up the gradients of all processes, clip, step

The loss is thus the mean over all supervised tokens of the step, and 1 x 32, 4 x 8 and 2 processes x 16 give
the same gradient. The usual mean of means gives short micro-batches too much weight.

Every step seeds the random generators from (seed, step, process), so a checkpoint need not hold their state,
and a resumed run draws the same dropout masks as one that was never stopped.
"""

import math
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config.load import to_dict
from config.schema import RunConfig
from load_data.loader import IGNORED
from train.engine.machine import Machine
from train.engine.optimizers import build_optimizers, set_lr
from train.engine.schedule import lr_factor, progress
from train.engine.stage import Stage
from train.engine.step_log import StepLog
from utils import checkpoint as files
from utils import distributed
from utils.device import seed_everything, synchronize
from utils.errors import UserError
from train.proof.gradient_check import prove_gradients_before
from train.proof.model_check import check_saved
from utils.plot import plot_curves
from train.proof.weight_witness import WeightWitness

STOPPING = (signal.SIGINT, signal.SIGTERM)  # end the run after the step at hand, with a checkpoint
PROOF_STEPS = 100  # steps of data that are searched for a label before the first step


class Trainer:
    """Trains one stage from its first step, or its newest checkpoint, to its end: `Trainer(...).run()`."""

    def __init__(self, stage: Stage, config: RunConfig, machine: Machine, out: Path, resume: bool = False):
        self.stage, self.config, self.machine, self.out = stage, config, machine, Path(out)
        self.step = self.tokens = self.skipped = 0
        self.elapsed = self.reserve = 0.0  # seconds of training so far, and kept for the last evaluation
        self.saved_in_epoch, self.saved_epoch = 0, 0
        self.last_good, self.finished = None, False
        self.best = None  # of `keep_best`: step, tokens, evaluation and weights
        self.received = self.signal = None  # a signal that came in, and one that all agreed to stop for
        self.model = stage.model.to(machine.device)
        parts = [f"{n} {tuple(p.shape)} {p.requires_grad}" for n, p in self.model.named_parameters()]
        distributed.same_on_all_ranks("\n".join(parts), "trainable parameters, or the shapes of all")
        distributed.same_on_all_ranks(stage.data_digest, "training data")
        distributed.broadcast_parameters(self.model)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.scaled)
        self.log = StepLog(self.out / stage.name)
        newest = files.latest_checkpoint(self.out, stage.short) if resume else None
        distributed.same_on_all_ranks(newest.name if newest else "", "checkpoint to go on from")
        if newest:
            self.restore(newest)
        # The compiled model is another object over the same weights; checkpoints come from the plain one.
        self.runner = torch.compile(self.model) if config.train.compile else self.model

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> dict:
        """Prove, train, evaluate, save, plot. Returns the numbers of the last evaluation."""
        if self.finished:
            self.machine.say(f"the run in {self.out} is finished at step {self.step}; more: --max-steps N")
            self.open_log()
        else:
            self.prove_before()
            self.open_log()
            witness = WeightWitness(self.model)
            self.train(witness)
            if self.signal:
                return self.interrupted()
            self.finish(witness)
        self.take_best()
        if self.machine.world.is_first:
            self.save_final()
            plot_curves(self.log.folder / "log.txt", self.log.folder / "curves.png")
            self.log.close()
        distributed.barrier()
        return self.last_evaluation

    def open_log(self) -> None:
        """From here on the run writes. A new one first removes what an earlier one left."""
        if self.machine.world.is_first:
            if self.log.positions[0] is None:
                self.clear()
            self.log.open()

    def prove_before(self) -> None:
        """Every trainable parameter gets a gradient from a real batch, every frozen one none."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        if odd := [name for name, p in self.model.named_parameters() if p.requires_grad != (id(p) in held)]:
            raise UserError(f"frozen or unfrozen after the optimizer was built: {', '.join(odd[:3])}")
        state = self.stage.loader.state_dict()
        for _ in range(PROOF_STEPS):  # the first batches may be without a label
            batches = [self.to_device(batch) for batch in self.stage.loader.next_step()]
            if any(map(supervised, batches)):
                break
        else:
            raise UserError(f"no label in the first {PROOF_STEPS} steps of data: nothing to learn from")
        self.stage.loader.load_state_dict(state)

        tokens = max(1, sum(map(supervised, batches)))
        scale = 2.0**12 if self.machine.scaled else 1.0  # in fp16 small gradients would underflow to zero

        def terms(model, batch):
            with self.machine.autocast():
                return {name: scale * term for name, term in self.stage.loss(model, batch, tokens)[0].items()}

        report = prove_gradients_before(
            self.model, terms, batches, prepare=lambda *given: self.hook("before_step", *given),
            claims=self.hook("claims") or {}, trains=self.stage.trains,
        )  # fmt: skip
        check_saved(self.model, self.weights())
        self.machine.say(report)

    def train(self, witness: WeightWitness) -> None:
        """Steps until a bound or a signal ends them."""
        self.started, self.began_at = time.monotonic() - self.elapsed, self.step - self.skipped
        before = {number: signal.signal(number, self.on_signal) for number in STOPPING}
        if self.step == 0:
            self.measure(1)  # the first batch of a process is slow and would make all look slow
            self.evaluate(self.config.train.eval_batches)
        bar = tqdm(total=100, disable=None if self.machine.world.is_first else True, leave=False,
                   bar_format="{percentage:3.0f}%|{bar:24}| {postfix}")  # fmt: skip
        try:
            while self.progress < 1 and not self.signal:
                self.one_step(witness, bar)
        finally:
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def progress(self) -> float:
        """Share of the run that is over, 0 to 1. Time is that of the first process, so that all agree."""
        train = self.config.train
        seconds = max(train.max_seconds - self.reserve, 1e-9) if train.max_seconds else None
        return progress(self.step, train.max_steps, self.elapsed, seconds)

    def one_step(self, witness: WeightWitness, bar: tqdm) -> None:
        """One optimizer step, and what is due after it."""
        epoch = int(self.stage.loader.epoch_progress)
        clock = time.perf_counter()
        micro_batches = self.stage.loader.next_step()
        waited = time.perf_counter() - clock
        world = self.machine.world
        (count,) = distributed.sum_scalars([sum(supervised(batch) for batch in micro_batches)])
        seed_everything(self.config.train.seed * 1_000_003 + self.step * world.size + world.rank)
        factor = lr_factor(self.config.optim, self.step, self.progress)
        set_lr(self.optimizers, factor)
        if count:
            values = self.forward_backward(micro_batches, count)
            values["grad_norm"] = self.update(witness)
            values |= self.hook("after_step", factor) or {}
        else:  # nothing to learn from: no step, no NaN
            values, self.skipped = {}, self.skipped + 1
        self.step += 1
        self.tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * world.size
        if self.machine.device.type != "cpu":
            synchronize(self.machine.device)
        self.log.note(values, waited, time.perf_counter() - clock)
        self.agree()
        self.show(bar)
        self.after_step(factor, new_epoch=int(self.stage.loader.epoch_progress) > epoch)

    def agree(self) -> None:
        """All go by the clock of the first process, and all stop if one got a signal by now."""
        elapsed = time.monotonic() - self.started if self.machine.world.is_first else 0.0
        received = [self.received == number for number in STOPPING]
        self.elapsed, *got = distributed.sum_scalars([elapsed, *received])
        self.signal = next((number for number, count in zip(STOPPING, got, strict=True) if count), None)

    def forward_backward(self, micro_batches: list[dict], count: float) -> dict[str, float]:
        """Gradients of the step's mean loss, summed over all processes; returns the step's numbers."""
        totals: dict[str, torch.Tensor] = {}
        micro_batches = [self.to_device(batch) for batch in micro_batches]
        self.hook("before_step", self.runner, micro_batches)
        for batch in micro_batches:
            with self.machine.autocast():
                terms, measures = self.stage.loss(self.runner, batch, count)
                loss = sum(terms.values())
            self.scaler.scale(loss).backward()
            for name, value in {"loss": loss, **terms, **measures}.items():
                totals[name] = totals.get(name, 0) + value.detach()
        distributed.sum_gradients(self.model.parameters())
        sums = distributed.sum_scalars([float(total) for total in totals.values()])
        values = dict(zip(totals, sums, strict=True))
        if not math.isfinite(values["loss"]):
            self.stop_on_nan(values["loss"])
        return values

    def hook(self, name: str, *arguments):
        """Call what the loss of this stage may have beside itself."""
        return getattr(self.stage.loss, name)(*arguments) if hasattr(self.stage.loss, name) else None

    def update(self, witness: WeightWitness) -> float:
        """Clip and step; returns the gradient norm before clipping."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.config.optim.grad_clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm) and not self.machine.scaled:
            self.stop_on_nan(norm, "gradient norm")
        for optimizer in self.optimizers:
            if math.isfinite(norm):  # under fp16 it may overflow: no step, and a smaller scale next time
                self.scaler.step(optimizer)
                witness.note_step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def stop_on_nan(self, value: float, what: str = "loss") -> None:
        """The run has gone wrong: say when, what is still good, and what to try."""
        good = "no checkpoint was written yet"
        if self.last_good:
            good = f"the last good checkpoint is {self.last_good}"
        raise UserError(
            f"the {what} is {value} at step {self.step + 1}; {good}; try a lower optim.lr (and "
            "optim.muon_lr), more optim.warmup_steps, optim.grad_clip=1.0, or train.dtype=fp32"
        )

    # --------------------------------------------------------------------------------------- after each step

    def show(self, bar: tqdm) -> None:
        """Loss, speed and time left on the progress bar."""
        done = self.progress
        loss, milliseconds = self.log.so_far()
        left = self.elapsed * (1 - done) / max(done, 1e-9)
        speed = self.tokens / self.step / milliseconds * 1e3
        bar.n = min(100, 100 * done)
        bar.set_postfix_str(
            f"step {self.step}  loss {loss:.3f}  {speed:,.0f} tok/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )

    def after_step(self, factor: float, new_epoch: bool) -> None:
        """Log, evaluate and save where they are due. A signal adds a checkpoint, and not a line to the log:
        the log of a resumed run is that of one which was never stopped."""
        train = self.config.train
        ending = self.progress >= 1
        if self.step % train.log_every == 0 or ending:
            place = {"step": self.step, "tokens": self.tokens, "epoch": self.stage.loader.epoch_progress}
            self.log.write(place, self.config.optim.lr * factor, self.tokens / self.step, self.skipped)
        if self.stage.keep_best and new_epoch and not ending:
            self.evaluate(None)
        elif self.step % train.eval_every == 0 and not ending:
            self.evaluate(train.eval_batches)
        if (self.step % train.save_every == 0 and not ending) or self.signal:
            self.save()

    def evaluate(self, batches: int | None) -> None:
        """Measure on held-out data, log it and say it; None measures on all of it."""
        clock = time.perf_counter()
        values = self.measure(batches)
        took = time.perf_counter() - clock
        self.log.write_row({"step": self.step, "tokens": self.tokens, **values, "eval_ms": took * 1e3})
        shown = "  ".join(
            f"{name} {value if isinstance(value, int) else format(value, '.4f')}"
            for name, value in values.items()
        )
        share = "all" if batches is None else "part"
        self.machine.say(f"step {self.step}  {shown}  ({share} of the held-out data)")
        self.last_evaluation = values
        if batches is not None:  # from a part, estimate how long the last evaluation will take
            took *= max(1.0, self.stage.evaluate.batches / batches)
            self.reserve = distributed.sum_scalars([took])[0] / self.machine.world.size
        elif (key := self.stage.keep_best) and values[key] > (self.best or {}).get("value", -math.inf):
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.weights().items()}
            self.best = {"step": self.step, "tokens": self.tokens, "value": values[key],
                         "evaluation": values, "weights": weights}  # fmt: skip

    def measure(self, batches: int | None) -> dict[str, float]:
        """The stage's evaluation as it is."""
        self.model.eval()
        with torch.no_grad(), self.machine.autocast():
            values = self.stage.evaluate(self.model, batches)
        self.model.train()
        return values

    # ------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """A checkpoint on the way, complete enough to go on from bit by bit."""
        if self.stage.loader.epoch != self.saved_epoch:
            self.saved_epoch, self.saved_in_epoch = self.stage.loader.epoch, 0
        self.saved_in_epoch += 1
        path = self.out / files.checkpoint_name(self.stage.short, self.saved_in_epoch, self.saved_epoch)
        if self.machine.world.is_first:
            training = {
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
                "loader": self.stage.loader.state_dict(),
                "log": self.log.state_dict(),
                "elapsed": self.elapsed,
                "reserve": self.reserve,
                "skipped": self.skipped,
                "saved": [self.saved_in_epoch, self.saved_epoch],
                "last_evaluation": self.last_evaluation,
                "finished": self.finished,
                "best": self.best,
            }
            files.save_checkpoint(path, {**self.contents(), "training": training})
            files.prune_checkpoints(self.out, self.stage.short, keep=2)
        self.last_good = path

    def contents(self) -> dict:
        """What every checkpoint holds."""
        return {
            "stage": self.stage.name,
            "short": self.stage.short,
            "config": to_dict(self.config),
            "weights": self.weights(),
            "base": self.stage.base,
            "tokenizer": self.stage.tokenizer.to_json(),
            "data_digest": self.stage.data_digest,
            "step": self.step,
            "tokens": self.tokens,
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the model."""
        own = self.stage.own
        return {name: part for name, part in self.model.state_dict().items() if own is None or name in own}

    def take_best(self) -> None:
        """Go back to the weights that did best on held-out data."""
        if self.best and self.best["step"] != self.step:
            files.load_weights(self.model, self.best["weights"], "the best weights", self.stage.own)
            self.step, self.tokens = self.best["step"], self.best["tokens"]
            self.last_evaluation = self.best["evaluation"]
            self.machine.say(f"best: step {self.step}, {self.stage.keep_best} {self.best['value']:.4f}")

    def save_final(self) -> None:
        """The result: what the next stage starts from and what chat loads."""
        path = self.out / files.final_name(self.stage.short)
        files.save_checkpoint(path, {**self.contents(), "evaluation": self.last_evaluation})
        self.machine.say(f"saved {path}")

    def restore(self, path: Path) -> None:
        """Go on from `path`. Raises `UserError` if this run is not the one that wrote it."""
        saved = files.load_checkpoint(path)
        self.check_same_run(saved, path)
        files.load_weights(self.model, saved["weights"], str(path), self.stage.own)
        state = saved["training"]
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.scaler.load_state_dict(state["scaler"])
        self.stage.loader.load_state_dict(state["loader"])
        self.step, self.tokens, self.skipped = saved["step"], saved["tokens"], state["skipped"]
        self.elapsed, self.reserve = state["elapsed"], state["reserve"]
        self.saved_in_epoch, self.saved_epoch = state["saved"]
        self.last_evaluation, self.best = state["last_evaluation"], state.get("best")
        self.log.load_state_dict(state["log"])
        self.last_good = path
        self.finished = state["finished"] and self.progress >= 1
        self.machine.say(f"resuming from {path} at step {self.step}")

    def check_same_run(self, saved: dict, path: Path) -> None:
        """A resumed run must have the settings and data of the one that it continues; its end may move."""
        may_change = {"max_steps", "max_seconds", "log_every", "eval_every", "eval_batches", "save_every"}
        may_change |= {"device", "paths", "cache_dir"}
        for section, values in to_dict(self.config).items():
            for key, value in values.items():
                was = saved["config"].get(section, {}).get(key)
                if was != value and key not in may_change:
                    raise UserError(
                        f"{path} was trained with {section}.{key}={was}, this command says {value}: resume "
                        "with the same settings, or start anew with --overwrite or in another --out"
                    )
        base, was = self.stage.base or {}, saved.get("base") or {}
        if base.get("digest") != was.get("digest"):
            raise UserError(
                f"{path} adapts {was.get('path')} (weights {was.get('digest')}), this command starts from "
                f"{base.get('path')} ({base.get('digest')}): name the same with --init"
            )
        if saved["data_digest"] != self.stage.data_digest:
            raise UserError(f"{path} was trained on other data: resume with the same, or start elsewhere")

    def clear(self) -> None:
        """Remove what an earlier run of this stage left; the command line has checked that it may."""
        final = self.out / files.final_name(self.stage.short)
        for path in [*files.find_checkpoints(self.out, self.stage.short), final]:
            path.unlink(missing_ok=True)
        files.prune_checkpoints(self.out, self.stage.short)

    # ----------------------------------------------------------------------------------------------- the end

    def finish(self, witness: WeightWitness) -> None:
        """After the last step: weights must have moved; all held-out data; a last checkpoint."""
        if self.step - self.skipped > self.began_at and not witness.steps:
            raise UserError(
                "no optimizer step was taken, as gradients overflowed each time: set train.dtype=bf16 or fp32"
            )
        self.machine.say(witness.prove_moved())
        self.save()  # the evaluation may take a while, and somebody may lose patience
        self.evaluate(None)
        self.elapsed = time.monotonic() - self.started
        self.finished = True
        self.save()
        self.machine.say(f"{self.step:,} steps, {self.tokens:,} tokens in {self.elapsed:.0f} seconds")

    def interrupted(self) -> dict:
        """A signal ended the run: its checkpoint is written."""
        self.log.close()
        name = signal.Signals(self.signal).name
        self.machine.say(f"stopped by {name} at step {self.step}; saved {self.last_good}; --resume goes on")
        distributed.leave(128 + self.signal)

    def on_signal(self, number, _frame) -> None:
        """Remember the signal; the step at hand is finished first."""
        self.received = number

    def to_device(self, batch: dict) -> dict:
        """Tensors of a micro-batch on the device of the run."""
        return {key: value.to(self.machine.device, non_blocking=True) for key, value in batch.items()}


def supervised(batch: dict) -> int:
    """Tokens of a micro-batch that have a label."""
    return int((batch["labels"] != IGNORED).sum())
