"""The short path: equal to the engine step by step, ends with a number and a sample, refuses in one line."""

import re
import sys

import pytest
import torch

from tests.train.tools import (
    ROOT, ListLoader, largest_difference, machine, make_trainer, random_tokens, small_config, small_model,
    weights_of,
)  # fmt: skip
from train import minimal
from train.engine.language_model_loss import LanguageModelLoss
from utils.errors import run_main
from utils.log import read_log

STEPS, SEED = 20, 3


@pytest.fixture
def small(monkeypatch):
    """Batches of 32 windows of 8 tokens, a warmup that ends within the run, and a limit that clips."""
    settings = {"B": 32, "T": 8, "LEARNING_RATE": 0.01, "WARMUP_STEPS": 5, "LARGEST_NORM": 0.8}
    for name, value in settings.items():
        monkeypatch.setattr(minimal, name, value)


def engine_losses(out, ids):
    """Losses, gradient norms and weights of the engine on the batches that minimal.py draws."""
    config = small_config(
        "optim.optimizer=adamw", f"optim.lr={minimal.LEARNING_RATE}", "optim.schedule=cosine",
        f"optim.warmup_steps={minimal.WARMUP_STEPS}", f"optim.weight_decay={minimal.WEIGHT_DECAY}",
        f"optim.grad_clip={minimal.LARGEST_NORM}", "train.dtype=fp32", steps=STEPS,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(SEED)
    steps = []
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - minimal.T, (minimal.B,), generator=generator)
        steps.append([dict(zip(("input_ids", "labels"), minimal.windows(ids, starts)))])
    model = small_model(config)
    loss = LanguageModelLoss(model, config, machine())
    make_trainer(out, config, model, ListLoader(steps), loss).run()
    rows = [row for row in read_log(out / "toy" / "log.txt") if "loss" in row]
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights_of(model)


def test_losses_equal_the_engines(small, tmp_path, monkeypatch):
    """Step by step, and the weights after the last; and a setting changed a little shows.

    The engine's AdamW is fused and rounds in another order: a dozen operations, each off by at most 2^-24 of
    its result, in each of 20 steps, 20 * 12 * 2^-24 = 1.4e-5. The log's six digits are ten times finer.
    """
    bound = STEPS * 12 * 2**-24
    ids = torch.from_numpy(random_tokens().astype("int64"))
    expected, norms, weights = engine_losses(tmp_path, ids)
    assert min(norms) < minimal.LARGEST_NORM < max(norms)  # some steps are clipped, some are not

    def minimal_losses():
        model = small_model(small_config())
        return minimal.train(model, ids, ids[:20], 1.0, STEPS, 1.0, SEED), weights_of(model)

    losses, ours = minimal_losses()
    assert len(losses) == STEPS and losses == pytest.approx(expected, rel=bound)
    assert largest_difference(ours, weights) < bound
    monkeypatch.setattr(minimal, "LARGEST_NORM", 0.9)
    changed, ours = minimal_losses()
    assert changed != pytest.approx(expected, rel=bound) and largest_difference(ours, weights) > 10 * bound


def test_your_own_text_ends_with_a_number_and_a_sample(small, tmp_path, capsys):
    """One line for each evaluation, which draws the curve; the last number is below that of the first."""
    text = "".join(f"The {n}th letter of the alphabet is {chr(97 + n)}.\n" for n in range(26)) * 4
    (tmp_path / "small.txt").write_text(text, encoding="utf-8")
    minimal.main(["--data", str(tmp_path / "small.txt"), "--steps", "3"])
    output = capsys.readouterr().out
    curve = [line.split() for line in output.splitlines() if line.endswith("*")]
    assert [int(row[0]) for row in curve] == [1, 2, 3]
    final = float(re.search(r"held-out text: ([\d.]+) bits per byte", output)[1])
    assert 0 < final < float(curve[0][2])
    cut = len(text) * 19 // 20
    assert output.split("--- sample ---\n")[1].startswith(text[cut : cut + 20])


def test_the_labels_follow_their_inputs(small):
    inputs, labels = minimal.windows(torch.arange(100, 200), torch.tensor([0, 91]))
    assert inputs.tolist() == [list(range(100, 108)), list(range(191, 199))]
    assert labels.tolist() == [list(range(101, 109)), list(range(192, 200))]


def test_the_default_text_is_the_standard_library():
    text = minimal.read_text(None)
    assert "def dedent(text):" in text and len(text) > 1_000_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "gone.txt"], "gone.txt: No such file"),
        (["--data", "short.txt"], "short.txt: 16 characters are too few; give at least"),
        (["--data", "latin.txt"], "latin.txt: not UTF-8"),
        (["--data", "."], "--data .:"),
        (["--steps", "-1"], "--steps"),
        (["--seconds", "nan"], "--seconds"),
        (["--seed", "-5"], "--seed"),
        (["--lr", "1"], "--lr"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short to use", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1") * 10_000)
    monkeypatch.setattr(sys, "argv", ["minimal.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_main(minimal.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and words in line


def test_nothing_of_the_engine_is_used():
    """The first evening needs no engine: no import from train/ or inference/, and one page."""
    text = (ROOT / "train" / "minimal.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (train|inference)\b", text, re.MULTILINE)
    assert len(text.splitlines()) <= 150
