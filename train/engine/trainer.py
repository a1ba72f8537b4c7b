"""The training engine: everything that all stages (train/engine/stage.py) share. One optimizer step:

    1. take all its micro-batches and count their supervised tokens, over all processes
    2. for each: loss = sum over its tokens / count of the whole step;  backward
    3. sum the gradients over all processes, clip, step

The loss is thus the mean over all supervised tokens of the step, and 1 x 32, 4 x 8 and 2 processes x 16 give
the same gradient. The usual mean of means gives short micro-batches too much weight.

Every step seeds the random generators from (seed, step, process) before it asks for its data. A checkpoint
need not hold their state, and a resumed run draws the same dropout masks and samples as one that never
stopped.
"""

import math
import signal
import time
from pathlib import Path

import torch

from config.schema import RunConfig
from modules.checkpointing import checkpoint_layers
from train.engine import parallel
from train.engine.checkpoints import Checkpoints
from train.engine.forecast import Forecast
from train.engine.machine import Machine
from train.engine.optimizers import build_optimizers, set_lr
from train.engine.held_out import HeldOut
from train.engine.schedule import lr_factor, progress
from train.engine.stage import Batch, Stage, Step
from train.engine.step_log import StepLog, progress_bar, show
from train.engine.stopping import StopSignals
from train.proof.gradient_check import prove_gradients_before
from train.proof.model_check import check_saved
from train.proof.weight_witness import WeightWitness
from utils import distributed
from utils.checkpoint import weights_digest
from utils.device import seed_everything, synchronize
from utils.errors import UserError
from utils.plot import plot_curves
from utils.products import multiply_with


class Trainer:
    """Trains one stage from its first step, or its newest checkpoint, to its end: `Trainer(...).run()`."""

    def __init__(self, stage: Stage, config: RunConfig, machine: Machine, out: Path, resume: bool = False):
        self.stage, self.config, self.machine, self.out = stage, config, machine, Path(out)
        self.step = self.tokens = self.skipped = 0
        self.elapsed, self.finished = 0.0, False  # seconds of training so far
        self.warm_from = 0  # the step at which the last warmup began
        self.signals, self.held_out, self.forecast = StopSignals(), HeldOut(self), Forecast(self)
        self.model = self.runner = stage.model
        checkpoint_layers(stage.model, config.train.gradient_checkpointing)
        parallel.place(stage.model, machine.device)
        distributed.same_on_all_ranks(stage.data_digest, "training data")
        for model in stage.frozen.values():
            parallel.place(model.requires_grad_(False).eval(), machine.device)
        self.frozen = self.frozen_digests()
        parts = [(part, stage.optim.get(name, config.optim)) for name, part in stage.trained.items()]
        self.optimizers = [each for part, optim in parts for each in build_optimizers(part, optim)]
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.scaled)
        self.products = machine.products  # a resumed run keeps that of its checkpoint
        self.lazy = machine.device.type == "cuda"  # fetch numbers from the device only when due
        self.log = StepLog(self.out / stage.name)
        self.checkpoints = Checkpoints(self)
        if resume:
            self.checkpoints.restore_newest()

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> dict:
        """Prove, train, evaluate, save and plot. Return the numbers of the last evaluation."""
        try:
            if self.finished:
                self.machine.say(f"the run in {self.out} is finished at step {self.step}; to give it more "
                                 "steps: --resume --max-steps N")  # fmt: skip
            else:
                with multiply_with(self.products):
                    self.prove_before()
                    self.runner = parallel.prepare(self.model, self.config.train.compile)
                    self.open_log()
                    witness = WeightWitness(self.model)
                    self.train(witness)
                    self.finish(witness)
            self.held_out.take_best()
            with distributed.all_or_none():
                if self.machine.world.is_first:
                    self.checkpoints.save_final()
                    plot_curves(self.log.folder / "log.txt", self.log.folder / "curves.png")
        finally:
            self.log.close()
            self.checkpoints.close()
        return self.held_out.last

    def prove_before(self) -> None:
        """Prove that every trainable parameter gets a gradient from a real batch, and no frozen one does."""
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups
                for p in group["params"]}  # fmt: skip
        if odd := [name for name, p in self.model.named_parameters() if p.requires_grad != (id(p) in held)]:
            raise UserError(f"requires_grad changed after the optimizer was built: {', '.join(odd[:3])}")
        sample, loss = self.stage.source.sample(), self.stage.loss
        batches = [self.to_device(batch) for batch in sample.micro_batches]
        scale = 2.0**12 if self.machine.scaled else 1.0  # in fp16 small gradients would underflow to zero

        def scaled_terms(model, batch):
            with self.machine.autocast():
                terms, _ = loss(model, batch, sample.weight)
            return {name: scale * term for name, term in terms.items()}

        report = prove_gradients_before(self.model, scaled_terms, batches, prepare=loss.before_step,
                                        claims=loss.claims(), trains=self.stage.trains)  # fmt: skip
        check_saved(self.model, parallel.state_dict(self.model, self.stage.own))
        self.machine.say(report)

    def open_log(self) -> None:
        """Begin to write. First move aside the checkpoints that are not continued."""
        with distributed.all_or_none():
            if self.machine.world.is_first:
                self.checkpoints.set_aside()
                self.log.open()

    def train(self, witness: WeightWitness) -> None:
        """Take steps until a bound or a signal ends them."""
        self.started, self.began_at = time.monotonic() - self.elapsed, self.step - self.skipped
        with self.signals, progress_bar(self) as bar:
            if self.step == 0:
                self.held_out.measure(1)  # the first batch of a process is slow and would make all look slow
                self.held_out.evaluate(self.config.train.eval_batches)
            while self.progress < 1 and not self.signals.agreed:
                self.one_step(witness, bar)
        if number := self.signals.agreed:  # the last step has saved a checkpoint
            self.log.close()
            self.machine.say(f"stopped by {signal.Signals(number).name} at step {self.step}; saved "
                             f"{self.checkpoints.last_good}; resume with --resume")  # fmt: skip
            distributed.leave(128 + number)

    @property
    def progress(self) -> float:
        """Share of the run that is over, 0 to 1. Time is that of the first process, so that all agree."""
        train = self.config.train
        seconds = max(train.max_seconds - self.held_out.reserve, 1e-9) if train.max_seconds else None
        return progress(self.step, train.max_steps, self.elapsed, seconds)

    # -------------------------------------------------------------------------------------- an optimizer step

    def one_step(self, witness: WeightWitness, bar) -> None:
        """Take one optimizer step, then log, evaluate and save what is due."""
        source, world, seed = self.stage.source, self.machine.world, self.config.train.seed
        epoch, before = int(source.epoch_progress), self.progress
        factor = lr_factor(self.config.optim, self.step - self.warm_from, before)
        seed_everything((seed * 1_000_003 + self.step * world.size + world.rank) % 2**63)
        set_lr(self.optimizers, factor)
        clock = time.perf_counter()
        step = source.next_step(self.stage.trained | self.stage.frozen, before)
        waited = time.perf_counter() - clock
        if step.weight:
            values = self.forward_backward(step)
            distributed.sum_gradients(self.model.parameters())
            values["grad_norm"] = self.update(witness)
            values |= self.stage.loss.after_step(factor) | step.numbers
        else:  # nothing to learn from: no step, no NaN
            values, self.skipped = {}, self.skipped + 1
        self.step += 1
        self.tokens += step.tokens
        if not self.lazy or self.step % self.config.train.log_every == 0:
            synchronize(self.machine.device)
        self.log.note(values, waited, time.perf_counter() - clock)
        self.elapsed = self.signals.agree(time.monotonic() - self.started if world.is_first else 0.0)
        self.forecast.note()
        self.after_step(factor, new_epoch=int(source.epoch_progress) > epoch, bar=bar)
        self.checkpoints.save_stable(before)

    def forward_backward(self, step: Step) -> dict[str, torch.Tensor]:
        """Add up the gradients of the step's mean loss in this process; return the numbers of the step."""
        totals: dict[str, torch.Tensor] = {}
        micro_batches = [self.to_device(batch) for batch in step.micro_batches]
        self.stage.loss.before_step(self.runner, micro_batches)
        for batch in micro_batches:
            with self.machine.autocast():
                terms, measures = self.stage.loss(self.runner, batch, step.weight)
                loss = sum(terms.values())
            self.scaler.scale(loss).backward()
            for name, value in {"loss": loss, **terms, **measures}.items():
                totals[name] = totals.get(name, 0) + value.detach()
        return dict(zip(totals, distributed.reduce(torch.stack(list(totals.values()))), strict=True))

    def update(self, witness: WeightWitness) -> torch.Tensor:
        """Clip and step; return the gradient norm before clipping, of all models together."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norms = [parallel.clip(part, self.config.optim.grad_clip) for part in self.stage.trained.values()]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        overflow = self.machine.scaled and not math.isfinite(norm)
        for optimizer in self.optimizers:
            if not overflow:  # else the fp16 scaler lowers its scale for the next step
                self.scaler.step(optimizer)
                witness.note_step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def to_device(self, batch: Batch) -> Batch:
        """Move a micro-batch to the device of the run."""
        if self.machine.device.type == "cuda":  # only pinned memory is copied while the GPU computes
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return {key: value.to(self.machine.device, non_blocking=True) for key, value in batch.items()}

    # --------------------------------------------------------------------------------------- after each step

    def after_step(self, factor: float, new_epoch: bool, bar) -> None:
        """Check, log, evaluate and save, each when it is due.

        A signal adds no line to the log, so a resumed run writes the same log as an uninterrupted one.
        """
        train, stopping, ending = self.config.train, self.signals.agreed, self.progress >= 1
        log_due, eval_due, save_due = (
            self.step % every == 0 for every in (train.log_every, train.eval_every, train.save_every)
        )
        if not self.lazy or log_due or eval_due or save_due or new_epoch or stopping or ending:
            self.check_finite()
            show(bar, self)
        if log_due or ending:
            place = {"step": self.step, "tokens": self.tokens, "epoch": self.stage.source.epoch_progress}
            self.log.write(place, self.config.optim.lr * factor, self.tokens / self.step, self.skipped)
        # Epochs may be shorter than a step, so whole evaluations are spaced apart.
        spaced = self.step - self.held_out.measured_at >= train.eval_every // 100
        if self.stage.keep_best and new_epoch and spaced and not ending:
            self.held_out.evaluate(None)
        elif eval_due and not ending:
            self.held_out.evaluate(train.eval_batches)
        if (save_due and not ending) or stopping:
            self.checkpoints.save()

    def check_finite(self) -> None:
        """Raise `UserError` if the loss or gradients were NaN or infinite since the last log line."""
        numbers, last = self.log.fetch(), self.checkpoints.last_good
        for key, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
            value = numbers.get(key, 0.0)
            if math.isfinite(value) or (key == "grad_norm" and self.machine.scaled):
                continue  # fp16 gradients may overflow
            good = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
            raise UserError(
                f"the {what} is {value} at step {self.step}; {good}; try a lower optim.lr (and "
                "optim.muon_lr), more optim.warmup_steps, optim.grad_clip=1.0, or train.dtype=fp32"
            )

    # ----------------------------------------------------------------------------------------------- the end

    def finish(self, witness: WeightWitness) -> None:
        """After the last step: prove that weights have moved, evaluate on all held-out data, and save."""
        if self.step - self.skipped > self.began_at and not witness.notes:
            raise UserError("no optimizer step was taken: gradients overflowed; set train.dtype=bf16 or fp32")
        self.machine.say(witness.prove_moved())
        for name, digest in self.frozen_digests().items():
            if digest != self.frozen[name]:
                raise UserError(f"the frozen model {name} was changed by training: is it in an optimizer?")
        self.checkpoints.save()  # the evaluation may take a while and be interrupted
        self.held_out.evaluate(None)
        self.elapsed = time.monotonic() - self.started
        self.finished = True
        self.checkpoints.save()
        self.machine.say(f"{self.step:,} steps, {self.tokens:,} tokens in {self.elapsed:.0f} seconds")
        self.forecast.compare()

    def frozen_digests(self) -> dict[str, str]:
        """Return a digest of the weights of each frozen model."""
        return {name: weights_digest(model.state_dict()) for name, model in self.stage.frozen.items()}
