"""Checkpoints of a run: their contents, their lifetime, and the rules for resuming.

Intermediate checkpoints hold all that is needed to continue bit by bit. The last two are kept, and with a wsd
schedule the stable one, written when the learning rate begins to decay: a run that is given a later end
continues from it, as if that end had been set from the first step. The final checkpoint is the result.

A new run (--overwrite) moves the intermediate checkpoints of an earlier one aside, deletes them after its own
first save, and puts them back if it fails before that. The earlier result stays until the new one replaces
it: the new run may start from it.
"""

import math
from pathlib import Path

from config.load import to_dict
from config.schema import RunConfig
from train.engine import parallel
from train.engine.schedule import begins_to_decay, lr_factor, progress
from utils import checkpoint as files
from utils import distributed
from utils.errors import UserError
from utils.lock import FolderLock
from utils.products import MKL

# Settings that a resumed run may change: its end, reporting, device and paths, the rule of the split, which
# the data digest covers, and the path of a teacher, whose weights are compared.
MAY_CHANGE = {"max_steps", "max_seconds", "log_every", "eval_every", "eval_batches", "save_every", "device",
              "paths", "cache_dir", "same_question", "gradient_checkpointing", "teacher"}  # fmt: skip
SIZES = ("batch_size", "accumulation_steps")  # may change if their product, times the processes, does not
OLD = ".old"  # suffix of a checkpoint that was moved aside


class Checkpoints:
    """Saves and restores `run`, a `Trainer`, in its folder, which is locked until `close`."""

    def __init__(self, run):
        self.run, self.out, self.short = run, run.out, run.stage.short
        self.epoch = self.index = 0  # of the last save; the index counts within the epoch
        self.last_good = self.lock = None
        self.aside = []
        with distributed.all_or_none():
            if run.machine.world.is_first:
                self.lock = FolderLock(self.out, run.stage.name)

    def close(self) -> None:
        """Unlock the folder. Put back the checkpoints of an earlier run if nothing has replaced them."""
        for path in self.aside:
            path.with_name(path.name + OLD).rename(path)
        self.aside = []
        if self.lock:
            self.lock.release()

    # --- saving ---

    def save(self) -> None:
        """Write an intermediate checkpoint."""
        run = self.run
        if run.machine.world.size > 1:
            digest = files.weights_digest(run.model.state_dict())
            distributed.same_on_all_ranks(digest, "weights, which have drifted apart")
        if run.stage.source.epoch != self.epoch:
            self.epoch, self.index = run.stage.source.epoch, 0
        self.index += 1
        self.write(self.out / files.checkpoint_name(self.short, self.index, self.epoch))

    def write(self, path: Path) -> None:
        """Write all that is needed to continue; then delete older checkpoints and what was moved aside."""
        with distributed.all_or_none():
            if self.run.machine.world.is_first:
                files.save_checkpoint(path, {**self.contents(), "training": self.training_state()})
                files.prune_checkpoints(self.out, self.short, keep=2)
        self.aside, self.last_good = [], path

    def save_stable(self, before: float) -> None:
        """Write the stable checkpoint if the learning rate begins to decay between `before` and now."""
        if begins_to_decay(self.run.config.optim, before, self.run.progress):
            self.write(self.out / files.stable_name(self.short))

    def save_final(self) -> None:
        """Write the result: the next stage starts from it, and chat loads it."""
        path = self.out / files.final_name(self.short)
        run = self.run
        own = run.stage.final_entries(run.model, run.config)
        files.save_checkpoint(path, {**self.contents(), "evaluation": run.held_out.last, **own})
        self.run.machine.say(f"saved {path}")

    def contents(self) -> dict:
        """Return what every checkpoint contains."""
        run, stage = self.run, self.run.stage
        return {
            "stage": stage.name, "short": stage.short, "config": to_dict(run.config),
            "weights": self.divided()[0], "base": stage.base,
            "tokenizer": stage.tokenizer.to_json() if stage.tokenizer else None,
            "data_digest": stage.data_digest, "step": run.step, "tokens": run.tokens,
        }  # fmt: skip

    def divided(self) -> tuple[dict, dict]:
        """Return the weights of the result of the stage, under names of its own, and all others."""
        weights, part = parallel.state_dict(self.run.model, self.run.stage.own), self.run.stage.result
        if part is None:
            return weights, {}
        others = {name: weight for name, weight in weights.items() if not name.startswith(f"{part}.")}
        mine = {name.removeprefix(f"{part}."): weights[name] for name in weights if name not in others}
        return mine, others

    def training_state(self) -> dict:
        """Return what only a resumed run needs."""
        run, held_out = self.run, self.run.held_out
        return {
            "others": self.divided()[1],
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "scaler": run.scaler.state_dict(),
            "loader": run.stage.source.state_dict(),
            "log": run.log.state_dict(),
            "elapsed": run.elapsed, "skipped": run.skipped, "finished": run.finished,
            "saved": [self.index, self.epoch], "warm_from": run.warm_from,
            "processes": run.machine.world.size, "frozen": run.frozen, "products": run.products,
            "reserve": held_out.reserve, "last_evaluation": held_out.last, "best": held_out.best,
            "measured_at": held_out.measured_at,
        }  # fmt: skip

    def set_aside(self) -> None:
        """Rename the checkpoints that this run does not continue; the command line has allowed it."""
        files.prune_checkpoints(self.out, self.short)
        found = files.find_checkpoints(self.out, self.short)
        self.aside = found[found.index(self.last_good) + 1 :] if self.last_good else found
        for path in self.aside:
            path.replace(path.with_name(path.name + OLD))

    # --- resuming ---

    def restore_newest(self) -> None:
        """Resume from the newest checkpoint, if any. Raises `UserError` if another run wrote it.

        If a later end would raise a learning rate that has decayed since, resume from before the decay.
        """
        try:
            found = files.find_checkpoints(self.out, self.short)
            path = found[-1] if found else None
            distributed.same_on_all_ranks(path.name if path else "", "checkpoint to resume from")
            if path:
                saved = files.load_checkpoint(path)
                if found[0].name == files.stable_name(self.short) and self.rate_would_rise(saved):
                    saved = files.load_checkpoint(path := found[0])
                self.restore(saved, path)
        except BaseException:
            self.close()
            raise

    def restore(self, saved: dict, path: Path) -> None:
        """Restore the state of the run at the time of `path`."""
        self.check_same_run(saved, path)
        run, held_out = self.run, self.run.held_out
        state, part, weights = saved["training"], run.stage.result, saved["weights"]
        if part:
            weights = {f"{part}.{name}": weight for name, weight in weights.items()} | state["others"]
        files.load_weights(run.model, weights, str(path), run.stage.own)
        for optimizer, values in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        if state["scaler"]:  # empty if the run has not used fp16 so far
            run.scaler.load_state_dict(state["scaler"])
        run.stage.source.load_state_dict(state["loader"])
        run.step, run.tokens, run.skipped = saved["step"], saved["tokens"], state["skipped"]
        self.index, self.epoch = state["saved"]
        run.elapsed, run.warm_from = state["elapsed"], state.get("warm_from", 0)
        run.products = state.get("products", MKL)  # older checkpoints always used MKL
        held_out.reserve, held_out.last = state["reserve"], state["last_evaluation"]
        held_out.best, held_out.measured_at = state.get("best"), state.get("measured_at", 0)
        run.log.load_state_dict(state["log"])
        self.last_good = path
        run.finished = state["finished"] and run.progress >= 1
        run.machine.say(f"resuming from {path} at step {run.step}")
        if path.name == files.stable_name(self.short):
            run.machine.say("  which lies before the decay of the learning rate")
        elif self.rate_would_rise(saved):
            run.warm_from = run.step
            run.machine.say(f"the run has a later end: the learning rate warms up again from step {run.step}")

    def rate_would_rise(self, saved: dict) -> bool:
        """Return whether a later end raises the learning rate that the run had in checkpoint `saved`."""
        was, now, optim = saved["config"]["train"], self.run.config.train, self.run.config.optim
        step, elapsed, reserve = saved["step"], saved["training"]["elapsed"], saved["training"]["reserve"]

        def factor(max_steps: int | None, max_seconds: float | None) -> float:
            seconds = max(max_seconds - reserve, 1e-9) if max_seconds else None
            return lr_factor(optim, step, progress(step, max_steps, elapsed, seconds))

        rises = factor(now.max_steps, now.max_seconds) > factor(was["max_steps"], was["max_seconds"]) + 1e-9
        return rises and step > optim.warmup_steps

    def check_same_run(self, saved: dict, path: Path) -> None:
        """Raise `UserError` if settings, base or data differ from those of the run to resume."""
        defaults = to_dict(RunConfig())  # for settings newer than the checkpoint
        for section, values in to_dict(self.run.config).items():
            known = defaults[section] | saved["config"].get(section, {})
            for key, value in values.items():
                if known[key] != value and key not in MAY_CHANGE and key not in SIZES:
                    raise UserError(
                        f"{path} was trained with {section}.{key}={known[key]}, this command says {value}: "
                        "resume with the same settings, or start over with --overwrite or in another --out"
                    )
        train, size, state = saved["config"]["train"], self.run.machine.world.size, saved["training"]
        was = [*(train[key] for key in SIZES), state.get("processes", size)]
        now = [*(getattr(self.run.config.train, key) for key in SIZES), size]
        if math.prod(was) != math.prod(now):
            words = "train.batch_size={} x train.accumulation_steps={} x {} processes"
            raise UserError(
                f"{path} was trained with {words.format(*was)}, this command says {words.format(*now)}: "
                "resume with the same product, or start over with --overwrite or in another --out"
            )
        base, earlier = self.run.stage.base or {}, saved.get("base") or {}
        if base.get("digest") != earlier.get("digest"):
            raise UserError(
                f"{path} adapts {earlier.get('path')} (weights {earlier.get('digest')}), this command starts "
                f"from {base.get('path')} ({base.get('digest')}): name the same base with --init"
            )
        if state.get("frozen", {}) != self.run.frozen:
            raise UserError(f"{path} was trained with other frozen models: name the same ones")
        if saved["data_digest"] != self.run.stage.data_digest:
            raise UserError(f"{path} was trained on other data: use the same, or choose another --out")
