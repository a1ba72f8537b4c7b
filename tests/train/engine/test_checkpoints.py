"""What a run leaves when something goes wrong, and when it may be resumed."""

import errno
import math
import os
import signal

import pytest
import torch

from tests.train.tools import (
    ListLoader,
    NoEvaluation,
    make_trainer,
    next_token_loss,
    same_bits,
    small_config,
    uneven_steps,
    weights_of,
)
from train.engine.machine import start_machine
from utils.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from utils.distributed import World
from utils.errors import UserError, run_main
from utils.log import RunLog, read_log
from utils.products import MKL, ONEDNN, PRECISION


def stopped_loss(at, what):
    """The loss of pre-training, which calls `what(loss)` in step `at`; put the trainer into the list."""
    holder = []

    def loss(model, batch, tokens):
        terms, measures = next_token_loss(model, batch, tokens)
        if holder and model is holder[0].model and holder[0].step + 1 == at:
            terms["ce"] = what(terms["ce"])
        return terms, measures

    return loss, holder


def train(out, *settings, steps=4, at=None, what=None, resume=False, **changes):
    """A toy run to its end, or to what happens in step `at`."""
    loss, holder = stopped_loss(at, what)
    config = small_config(*settings, steps=steps)
    trainer = make_trainer(out, config, loss=loss, resume=resume, **changes)
    holder.append(trainer)
    trainer.run()
    return trainer


def pickles(out):
    return {path.name: path.read_bytes() for path in out.glob("*.pkl*")}


# --- T5: an earlier run is replaced, and not before there is something new ----------------------------------


def spoil(loss):
    return loss * math.nan


def test_a_new_run_that_fails_before_its_first_save_loses_nothing(tmp_path):
    train(tmp_path, "train.save_every=1")
    before = pickles(tmp_path)
    assert len(before) == 3
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        train(tmp_path, "optim.lr=0.02", at=2, what=spoil)
    assert pickles(tmp_path) == before


def test_a_new_run_replaces_the_old_checkpoints_at_its_first_save_and_the_result_at_its_end(tmp_path):
    """The result may be what the new run starts from. Checkpoints of other stages stay."""
    train(tmp_path, "train.save_every=1", steps=6)
    (tmp_path / "TinySeek_Other1_0.pkl").write_bytes(b"of another stage")
    result = tmp_path / "TinySeek_Toy_final.pkl"
    before = result.read_bytes()
    with pytest.raises(UserError, match="the loss is nan at step 4"):
        train(tmp_path, "train.save_every=2", "optim.lr=0.02", at=4, what=spoil)
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path, "Toy")] == [2]
    assert result.read_bytes() == before
    assert sorted(pickles(tmp_path)) == ["TinySeek_Other1_0.pkl", "TinySeek_Toy1_0.pkl", result.name]
    train(tmp_path, "optim.lr=0.02")
    assert load_checkpoint(result)["step"] == 4


# --- T4: one run at a time in a folder ----------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_over(tmp_path):
    first = make_trainer(tmp_path, small_config(steps=1))
    with pytest.raises(UserError, match=rf"in use by another run \(toy, process {os.getpid()}\).*--out DIR"):
        make_trainer(tmp_path, small_config(steps=1))
    first.run()
    with pytest.raises(UserError, match="optim.lr"):  # a run that is refused for another reason
        make_trainer(tmp_path, small_config("optim.lr=0.5"), resume=True)
    train(tmp_path, steps=1)


# --- T6, T14: the same run ----------------------------------------------------------------------------------


def test_the_number_of_processes_belongs_to_the_batch(tmp_path):
    train(tmp_path, "train.batch_size=4", steps=2)
    two = {"world": World(0, 2, 0), "resume": True}
    with pytest.raises(UserError, match=r"=4 x .*=1 x 1 processes, this command says .*=4 x .*=1 x 2 "):
        make_trainer(tmp_path, small_config("train.batch_size=4"), **two)
    for sizes in (("train.batch_size=2",), ("train.batch_size=1", "train.accumulation_steps=2")):
        make_trainer(tmp_path, small_config(*sizes), **two).checkpoints.close()


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(tmp_path):
    """With the default of that setting only."""
    train(tmp_path, steps=2)
    (path, *_) = reversed(find_checkpoints(tmp_path, "Toy"))
    saved = load_checkpoint(path)
    del saved["config"]["optim"]["grad_clip"], saved["config"]["gate"], saved["training"]["processes"]
    save_checkpoint(path, saved)
    for setting in ("optim.grad_clip=0.5", "train.seed=3", "data.sequence_length=5"):
        key, _, value = setting.partition("=")
        with pytest.raises(UserError, match=f"was trained with {key}=.*, this command says {value}"):
            make_trainer(tmp_path, small_config(setting), resume=True)
    assert train(tmp_path, steps=3, resume=True).step == 3


def test_a_resumed_run_multiplies_as_it_began(tmp_path):
    """Another library would round differently. Older checkpoints say nothing: there was only MKL."""
    used = []

    def note(loss):  # called in the last step
        used.append(torch.backends.mkldnn.matmul.fp32_precision)
        return loss

    train(tmp_path, steps=2, products=ONEDNN, at=1, what=note)
    train(tmp_path, steps=3, resume=True, at=3, what=note)
    assert used == [PRECISION[ONEDNN]] * 2 and torch.backends.mkldnn.matmul.fp32_precision not in used
    (path, *_) = reversed(find_checkpoints(tmp_path, "Toy"))
    saved = load_checkpoint(path)
    assert saved["training"].pop("products") == ONEDNN
    save_checkpoint(path, saved)
    assert train(tmp_path, steps=4, resume=True, products=ONEDNN).products == MKL


def test_resuming_under_fp16_starts_a_scaler(tmp_path):
    """T11. The checkpoint of an unscaled run has none."""
    train(tmp_path, steps=2)
    trainer = train(tmp_path, steps=4, resume=True, scaled=True)
    assert trainer.step == 4 and trainer.scaler.get_scale() > 1


# --- T10: schedules -----------------------------------------------------------------------------------------

WSD = ("optim.schedule=wsd", "optim.warmup_steps=4", "train.save_every=2")


def rates(out):
    return {row["step"]: row["lr"] for row in read_log(out / "toy" / "log.txt") if "lr" in row}


def test_a_finished_run_with_a_later_end_continues_from_before_its_decay(tmp_path, capsys):
    """Bit by bit like a run that had this end from the first step; killed and resumed on the way as well."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *WSD, steps=30)
    train(parts, *WSD, "train.save_every=3", steps=10)
    kept = [load_checkpoint(path)["step"] for path in find_checkpoints(parts, "Toy")]
    assert kept == [6, 10, 10] and rates(parts)[10] < 0.3 * 0.01
    with pytest.raises(UserError, match="nan at step 8"):  # before the first save: all is as it was
        train(parts, *WSD, "train.save_every=3", steps=30, resume=True, at=8, what=spoil)
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(parts, "Toy")] == kept
    with pytest.raises(UserError, match="nan at step 14"):
        train(parts, *WSD, "train.save_every=3", steps=30, resume=True, at=14, what=spoil)
    assert "TinySeek_Toy_stable.pkl at step 6\n" in capsys.readouterr().out
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(parts, "Toy")] == [6, 9, 12]
    train(parts, *WSD, "train.save_every=3", steps=30, resume=True)
    assert rates(parts) == rates(whole)
    one, two = (load_checkpoint(out / "TinySeek_Toy_final.pkl")["weights"] for out in (parts, whole))
    assert same_bits(one, two)


def test_a_run_killed_before_its_first_save_after_the_stable_checkpoint(tmp_path):
    """What came after it was moved aside, and is not put back by a process that is killed."""
    train(tmp_path / "whole", *WSD, steps=30)
    train(tmp_path / "parts", *WSD, steps=10)
    for path in find_checkpoints(tmp_path / "parts", "Toy")[1:]:
        path.rename(path.with_name(path.name + ".old"))
    train(tmp_path / "parts", *WSD, steps=30, resume=True)
    one, two = (load_checkpoint(tmp_path / name / "TinySeek_Toy_final.pkl")["weights"]
                for name in ("whole", "parts"))  # fmt: skip
    assert same_bits(one, two) and not list(tmp_path.rglob("*.old"))


def test_a_new_run_replaces_the_stable_checkpoint_too(tmp_path):
    train(tmp_path, *WSD, steps=10)
    train(tmp_path, *WSD, "optim.schedule=cosine", steps=10)
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path, "Toy")] == [10, 10]


def test_a_finished_run_without_a_stable_checkpoint_warms_up_again(tmp_path, capsys):
    """As another schedule or an older TinySeek leaves it. From nearly zero, in steps not larger than those of
    the first warmup; stopped and resumed as well."""
    train(tmp_path / "a", *WSD, steps=10)
    (tmp_path / "a" / "TinySeek_Toy_stable.pkl").unlink()
    assert rates(tmp_path / "a")[10] < 0.3 * 0.01
    train(tmp_path / "a", *WSD, steps=30, resume=True)
    assert "warms up again from step 10" in capsys.readouterr().out
    found = [rates(tmp_path / "a")[step] for step in range(11, 31)]
    rises = [after - before for before, after in zip([0.0, *found], found)]
    assert max(found) == pytest.approx(0.01) and max(rises) < 0.01 / 5 + 1e-9

    train(tmp_path / "b", *WSD, steps=10)
    (tmp_path / "b" / "TinySeek_Toy_stable.pkl").unlink()
    with pytest.raises(UserError):
        train(tmp_path / "b", *WSD, steps=30, resume=True, at=14, what=spoil)
    train(tmp_path / "b", *WSD, steps=30, resume=True)
    assert rates(tmp_path / "a") == rates(tmp_path / "b")
    one, two = (load_checkpoint(tmp_path / name / "TinySeek_Toy_final.pkl")["weights"] for name in "ab")
    assert same_bits(one, two)


@pytest.mark.parametrize(("steps", "warned"), [(4, True), (5, False)])
def test_a_warmup_that_does_not_end_is_said(monkeypatch, capsys, steps, warned):
    for name in ("keep_freed_memory", "set_threads"):
        monkeypatch.setattr(f"train.engine.machine.{name}", lambda: 1)
    start_machine(small_config(*WSD, steps=steps))
    assert ("warning: optim.warmup_steps=4 is not below" in capsys.readouterr().out) == warned


# --- T11: errors in one line --------------------------------------------------------------------------------


def test_a_full_disk_at_a_line_of_the_log(tmp_path):
    log = RunLog(tmp_path / "log.txt")

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    log.file = Full()
    with pytest.raises(UserError, match=r"could not write .*log\.txt: No space left on device.*--resume"):
        log.write({"step": 1})


def test_a_seed_like_a_date(tmp_path):
    assert train(tmp_path, "train.seed=20251121123456", steps=1).step == 1


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), MemoryError(),
], ids=["cpu", "cuda", "python"])  # fmt: skip
def test_out_of_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: out of memory") and "train.batch_size" in line


# --- T14: signals, and short epochs -------------------------------------------------------------------------


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, at=2, what=twice)
    assert not find_checkpoints(tmp_path, "Toy")
    make_trainer(tmp_path, small_config()).checkpoints.close()  # the folder is not locked


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As `nohup` does with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = train(tmp_path, at=2, what=lambda loss: os.kill(os.getpid(), signal.SIGHUP) or loss)
        assert trainer.step == 4 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_epochs_of_one_step_are_not_all_evaluated(tmp_path):
    """At most a hundred times in `eval_every` steps."""
    evaluation = NoEvaluation()
    steps = [uneven_steps()[0]]
    config = small_config("train.eval_every=500", steps=20)
    trainer = make_trainer(tmp_path, config, loader=ListLoader(steps), evaluate=evaluation)
    trainer.stage.keep_best = "val_loss"
    trainer.run()
    assert evaluation.calls.count(None) == 4  # at 5, 10, 15 and at the end
    assert all(torch.isfinite(part).all() for part in weights_of(trainer.model).values())
