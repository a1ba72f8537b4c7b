"""One batch of eight, four micro-batches, two processes: the same weights, the same log, the same evaluation.

The oracle is the obvious loop of `tools.py`, which knows nothing of processes, and one process against two of
them.
"""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.processes import fork, without_pictures
from tests.train.test_bad_input import call_main
from tests.train.tools import (
    PLAIN,
    ListLoader,
    largest_difference,
    make_trainer,
    next_token_loss,
    obvious_loop,
    same_bits,
    small_config,
    small_model,
    uneven_steps,
    weights_of,
    without_timing,
)
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.log import read_log

ROUNDING = 2e-6  # weights of size about 0.1, a few steps of AdamW at 0.01


def share_of_steps(rank, size):
    """Process `rank` gets every `size`-th micro-batch of `uneven_steps`: quite different numbers of
    labels."""
    return [batches[rank::size] for batches in uneven_steps()]


def processes_main(out, signalled=False, resume=False):
    """What each of the processes runs. With `signalled` the second process, and nobody else, gets a SIGTERM
    in the third step."""
    world = distributed.start("cpu")
    config = small_config(*PLAIN)

    def loss(model, batch, tokens):
        if signalled and world.rank == 1 and model is trainer.model and trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token_loss(model, batch, tokens)

    model = small_model(config)
    if world.rank:  # the weights of the first process must win
        torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    loader = ListLoader(share_of_steps(world.rank, world.size))
    trainer = make_trainer(
        out, config, model=model, loader=loader, loss=loss, world=world, resume=resume
    )
    trainer.run()
    torch.save(weights_of(trainer.model), Path(out) / f"weights_{world.rank}.pt")
    distributed.finish()


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_equal_the_obvious_loop(tmp_path):
    """With uneven labels: in some steps one process has none, in one step none has. A signal reaches only the
    second process: both must stop after the same step, and neither wait for the other for ever."""
    counts = [
        [sum(int((b["labels"] >= 0).sum()) for b in step) for step in share_of_steps(r, 2)] for r in (0, 1)
    ]
    assert any(bool(a) != bool(b) for a, b in zip(*counts)) and any(not a and not b for a, b in zip(*counts))
    done = fork(processes_main, tmp_path, True, processes=2, timeout=60)
    assert done.exit_codes == [143, 143], done.stderr
    assert "stopped by SIGTERM at step 4; saved" in done.stdout and not done.stderr
    assert load_checkpoint(tmp_path / "TinySeek_Toy1_0.pkl")["step"] == 4
    done = fork(processes_main, tmp_path, False, True, processes=2, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"weights_{rank}.pt") for rank in (0, 1))
    assert same_bits(first, second)
    weights, losses = obvious_loop(small_config(*PLAIN), uneven_steps())
    assert largest_difference(first, weights) < ROUNDING
    rows = [row for row in read_log(tmp_path / "toy" / "log.txt") if "epoch" in row]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=2e-5)
    assert rows[-1]["skipped"] == 1 and rows[-1]["tokens"] == 6 * 4 * 2 * 8


def pre_train(monkeypatch, out, batch_size, accumulation, processes, text, cache):
    """A run of the real script: eight sequences a step, divided in one way or another."""
    words = [
        "--config", "tiny", "--data", text, "--out", out, "--device", "cpu", "--max-steps", "8",
        "--set", "train.dtype=fp32", "--set", "tokenizer.kind=char",
        "--set", f"train.batch_size={batch_size}", "--set", f"train.accumulation_steps={accumulation}",
        "--set", "train.eval_batches=1000",
    ]  # fmt: skip
    if processes == 1:  # in this process: Python takes longer to start than to train
        assert call_main(monkeypatch, cache.parent, *words) == 0
    else:
        words += ["--set", f"data.cache_dir={cache}"]
        done = fork(without_pictures, "train.pre_train", *words, processes=processes)
        assert done.returncode == 0, done.stderr
    return load_checkpoint(out / "TinySeek_Pre_final.pkl"), read_log(out / "pre_train" / "log.txt")


@pytest.mark.slow
def test_the_real_script_gives_the_same_however_a_step_is_divided(tmp_path, monkeypatch):
    """1 process x 8 sequences, 1 x 2 x 4 micro-batches, 2 processes x 2 x 2: weights, losses, evaluations.
    Here the processes prepare the data themselves, from a cache that is empty for the two of them."""
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).read_text(encoding="utf-8") + "\n") * 3, encoding="utf-8")
    big, big_log = pre_train(monkeypatch, tmp_path / "big", 8, 1, 1, text, tmp_path / "cache")
    for batch_size, accumulation, processes in ((2, 4, 1), (2, 2, 2)):
        out = tmp_path / f"{processes}"
        sizes = (batch_size, accumulation, processes)
        other, log = pre_train(monkeypatch, out, *sizes, text, tmp_path / f"cache{processes}")
        assert big["tokens"] == other["tokens"] == 8 * 8 * 64
        assert largest_difference(big["weights"], other["weights"]) < 2e-5  # lr 0.005, weights up to 1
        assert len(log) == len(big_log)
        for row, expected in zip(without_timing(log), without_timing(big_log), strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
        assert math.isfinite(log[-1]["val_bpb"])
