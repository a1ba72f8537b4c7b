"""Pre-training as a whole: its budget of seconds, what it starts from, what it leaves."""

import os
import signal

import pytest

from tests.train.test_bad_input import QUICK, TEXT, call_main
from tests.train.tools import make_trainer, next_token_loss, random_tokens, small_config
from load_data.loader import TokenLoader
from utils.checkpoint import find_checkpoints, load_checkpoint
from utils.log import read_log


@pytest.fixture
def pre_train(tmp_path, monkeypatch):
    """Runs pre-training within this process and returns the folder that it wrote."""

    def call(name, *arguments, text=TEXT):
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        out = tmp_path / name
        assert (
            call_main(
                monkeypatch, tmp_path, "--data", tmp_path / "text.txt", "--out", out, *QUICK, *arguments
            )
            == 0
        )
        return out

    return call


class Clock:
    """Time that passes only when something is done: 0.1 seconds a micro-batch, 0.05 a batch of evaluation."""

    batches = 20  # of the whole evaluation, which takes a second

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def loss(self, model, batch, tokens):
        self.now += 0.1
        return next_token_loss(model, batch, tokens)

    def __call__(self, model, max_batches):
        self.now += 0.05 * (max_batches or self.batches)
        return {"val_loss": 1.0}


@pytest.mark.parametrize("stop_at", [None, 2.0])
def test_the_budget_to_the_tenth_of_a_second(tmp_path, monkeypatch, stop_at):
    """Steps and evaluations, the last one included, take five seconds; stopped and resumed in between as
    well. The hour between is not counted."""
    clock = Clock()
    monkeypatch.setattr("train.engine.trainer.time", clock)
    monkeypatch.setattr("train.engine.held_out.time", clock)
    settings = [
        "train.eval_every=10",
        "train.eval_batches=2",
        "optim.schedule=cosine",
        "optim.warmup_steps=0",
    ]
    config = small_config(*settings)
    config.train.max_steps, config.train.max_seconds = None, 5.0

    def loss(model, batch, tokens):
        if stop_at and model is trainer.model and trainer.elapsed > stop_at and clock.now < 2000:
            os.kill(os.getpid(), signal.SIGTERM)
        return clock.loss(model, batch, tokens)

    trainer = make_trainer(tmp_path, config, loss=loss, evaluate=clock)
    if stop_at:
        with pytest.raises(SystemExit):
            trainer.run()
        clock.now += 3600
        trainer = make_trainer(tmp_path, config, loss=loss, evaluate=clock, resume=True)
    trainer.run()
    rates = [row["lr"] for row in read_log(tmp_path / "toy" / "log.txt") if "lr" in row]
    assert rates[0] > 0.99 * config.optim.lr and rates[-1] < 0.01 * config.optim.lr
    assert 4.95 < trainer.elapsed < 5.15
    assert trainer.step == 36  # 4 seconds, less 0.15 before the first step and 0.3 for three evaluations


@pytest.mark.parametrize("seconds", [2.0, 40.0])
def test_a_budget_below_the_estimate_of_the_evaluation_still_trains(tmp_path, monkeypatch, capsys, seconds):
    """An evaluation takes 20 seconds: a bound of 2 keeps half of itself for training, and says so."""
    clock = Clock()
    clock.batches = 400
    for module in ("trainer", "held_out"):
        monkeypatch.setattr(f"train.engine.{module}.time", clock)
    config = small_config("train.eval_batches=2", "train.eval_every=1000")
    config.train.max_steps, config.train.max_seconds = None, seconds
    trainer = make_trainer(tmp_path, config, loss=clock.loss, evaluate=clock)
    trainer.run()
    assert trainer.step == round((seconds / 2 - 0.15) / 0.1 + 0.5)
    said = capsys.readouterr().out
    assert ("will take about 20 seconds, more than half of train.max_seconds=2" in said) == (seconds == 2.0)


def test_what_a_run_leaves(pre_train, curves):
    """The names that design promises, and a final checkpoint that holds all that the next stage needs."""
    out = pre_train("out", "--max-steps", "3", "--set", "train.save_every=1", "--set", "optim.optimizer=muon")
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert names == [
        ".lock",
        "TinySeek_Pre3_0.pkl",
        "TinySeek_Pre4_0.pkl",
        "TinySeek_Pre_final.pkl",
        "pre_train/curves.png",
        "pre_train/log.txt",
    ]
    final = load_checkpoint(out / "TinySeek_Pre_final.pkl")
    assert final["config"]["model"]["vocab_size"] == len(final["weights"]["model.embed_tokens.weight"])
    assert set(final["evaluation"]) == {"val_loss", "val_ppl", "val_conf", "val_bpb"}
    rows = read_log(out / "pre_train" / "log.txt")
    assert rows[-1]["val_bpb"] == pytest.approx(final["evaluation"]["val_bpb"], rel=1e-5)


def test_starting_from_a_checkpoint_goes_on_from_its_weights(pre_train):
    """Its model and tokenizer come with it, whatever the preset says; the first loss is where the last one
    was."""
    first = pre_train(
        "first", "--max-steps", "30", "--set", "model.hidden_size=16", "--set", "model.head_dim=4"
    )
    init = first / "TinySeek_Pre_final.pkl"
    second = pre_train("second", "--init", init, "--max-steps", "1", "--set", "train.eval_batches=1000")
    last, start = (read_log(out / "pre_train" / "log.txt") for out in (first, second))
    assert start[0]["val_loss"] == pytest.approx(last[-1]["val_loss"], rel=1e-5)
    assert start[0]["val_loss"] < last[0]["val_loss"] - 0.3
    assert load_checkpoint(second / "TinySeek_Pre_final.pkl")["config"]["model"]["hidden_size"] == 16


def test_more_steps_for_a_finished_run(pre_train, capsys):
    """--resume alone says that it is finished and changes nothing; with a later end it goes on."""
    out = pre_train("out", "--max-steps", "3")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    pre_train("out", "--max-steps", "3", "--resume")
    assert "is finished at step 3; to give it more steps: --resume --max-steps N" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    pre_train("out", "--max-steps", "5", "--resume")
    assert load_checkpoint(find_checkpoints(out, "Pre")[-1])["step"] == 5
    assert [row["step"] for row in read_log(out / "pre_train" / "log.txt") if "loss" in row] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_the_same_command_gives_the_same_run(pre_train):
    """With data prepared now and with data from the cache, one seed; and another seed gives another run."""
    weights = [
        load_checkpoint(pre_train(name, "--seed", seed) / "TinySeek_Pre_final.pkl")["weights"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, again, other = (weight["model.layers.0.mlp.up_proj.weight"] for weight in weights)
    assert first.equal(again) and not first.equal(other)


def test_what_next_is_said_on_the_last_line(pre_train, capsys):
    out = pre_train("out")
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f'next: python inference/chat.py --out {out} --prompt "def "'
    )


@pytest.mark.parametrize("tokens", [9, 20])
def test_the_shortest_texts_that_can_be_trained_on(tmp_path, tokens):
    """One window and a half: several epochs within one step."""
    trainer = make_trainer(tmp_path, small_config(), loader=TokenLoader(random_tokens(tokens), 8, 4))
    trainer.run()
    assert trainer.step == 6 and trainer.stage.source.epoch > 2
