"""The forecast of a run on a clock that the tests move: every step and evaluation takes the time they say."""

import time

import pytest
import torch

from config.load import load_config
from config.schema import TrainConfig
from tests.train.tools import ListLoader, make_loader, make_trainer, small_config
from train.engine import forecast
from train.engine.forecast import Costs, duration, end_of_run, longest_rows

SLOW, STEP, BATCH, SAVE = 7.0, 2.0, 2.0, 3.0  # seconds of a first step, a step, a batch of evaluation, a save


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class SlowEvaluation:
    """Held-out data of eight batches."""

    batches = 8

    def __init__(self, clock):
        self.clock = clock

    def __call__(self, model, max_batches):
        self.clock.now += BATCH * min(max_batches or self.batches, self.batches)
        return {"val_loss": 0.5}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Train with `settings`; return the forecast, the trainer and the words that were printed."""

    def train(*settings, steps=60, resume=False, lazy=False):
        clock = Clock(monkeypatch)
        config = small_config("train.eval_every=20", "train.save_every=30", "train.eval_batches=1",
                              "train.log_every=10", *settings, steps=steps)  # fmt: skip
        loader = make_loader(config)
        plain, taken = loader.next_step, []

        def next_step(progress=0.0):
            taken.append(1)
            clock.now += SLOW if len(taken) <= forecast.SLOW else STEP
            return plain(progress)

        loader.next_step = next_step
        trainer = make_trainer(tmp_path / "run", config, loader=loader, evaluate=SlowEvaluation(clock),
                               resume=resume)  # fmt: skip
        trainer.lazy = lazy
        save = trainer.checkpoints.save

        def slow_save():
            clock.now += SAVE
            save()

        monkeypatch.setattr("train.engine.trainer.plot_curves", lambda *files: None)
        trainer.prove_before = lambda: taken.clear()  # the proof samples data, too
        trainer.checkpoints.save = slow_save
        monkeypatch.setattr(forecast, "SAVING", SAVE / sum(p.numel() for p in trainer.model.parameters()))
        trainer.run()
        return trainer.forecast, trainer, capsys.readouterr().out

    return train


def test_a_run_bounded_by_steps_is_forecast_to_the_second(run):
    """By hand: 5 slow steps and 55 quick ones; evaluations of one batch at 0, 20 and 40, after an unmeasured
    one; a checkpoint at 30; at the end a checkpoint and all eight batches. A part is spread over all steps,
    and the forecast counts those that are spread over the first steps too late."""
    told, trainer, words = run()
    real = 5 * SLOW + 55 * STEP + (1 + 1 + 2) * BATCH + SAVE + SAVE + 8 * BATCH
    assert trainer.elapsed == pytest.approx(real)
    start = 3 * BATCH + 5 * SLOW + 25 * STEP  # where it is made, after 30 steps
    rest = 30 * (STEP + BATCH / 20 + SAVE / 30) + 8 * BATCH + SAVE
    assert told.made[:2] == pytest.approx((60, start + rest))
    assert words.count("forecast after 30 steps of 2000 ms: 60 steps") == 1
    seconds = f"{(start + rest) / 60:.1f} minutes, measured {real / 60:.1f} minutes"
    assert f"predicted 60 steps, measured 60 steps (+0.0%); {seconds}" in words
    assert " of memory (" in words or len(told.made) == 2


@pytest.mark.parametrize("more", [(), ("train.eval_every=7", "train.save_every=6")])
def test_a_run_bounded_by_seconds_is_forecast_to_the_step(run, more):
    """Time for the last evaluation is kept free; evaluations and checkpoints cost steps, and are not taken
    for slow ones."""
    told, trainer, words = run("train.max_seconds=200", *more, steps="null")
    assert "steps of 2000 ms" in words
    assert told.made[0] == pytest.approx(trainer.step, abs=2 * (BATCH + SAVE) / STEP)
    assert told.made[1] == pytest.approx(trainer.elapsed, abs=2 * (BATCH + SAVE))
    assert trainer.step < (200 - 5 * SLOW - 8 * BATCH) / STEP  # what a forecast of steps alone would say


def test_a_resumed_run_is_forecast_as_a_whole(run):
    """The first steps of its process are slow again, and its first seconds are those of the checkpoint."""
    _, first, _ = run(steps=30)
    told, trainer, words = run(steps=80, resume=True)
    assert "forecast after 30 steps of 2000 ms: 80 steps" in words
    assert told.made[1] == pytest.approx(trainer.elapsed, abs=2 * (BATCH + SAVE))
    assert trainer.elapsed > first.elapsed + 5 * SLOW + 45 * STEP


@pytest.mark.parametrize(("every", "after"), [(10, 30), (30, 60)])
def test_where_numbers_stay_on_the_device_only_finished_steps_are_measured(run, every, after):
    """Every tenth or thirtieth step waits for the GPU: measured between those after the slow ones."""
    _, _, words = run(f"train.log_every={every}", "train.eval_every=60", "train.save_every=60", lazy=True)
    assert f"forecast after {after} steps of 2000 ms" in words


def test_a_short_run_goes_without(run):
    told, _, words = run(steps=29)
    assert told.made is None and "forecast" not in words and "predicted" not in words


@pytest.mark.parametrize(("seconds", "after"), [(2 * STEP, 4), (100.0, 5)])
def test_quick_steps_are_measured_for_seconds_or_a_tenth_of_the_run(run, monkeypatch, seconds, after):
    """By hand: two slow steps and two measured ones; a tenth of 50 steps."""
    for name, value in {"SLOW": 2, "STEPS": 1, "SECONDS": seconds}.items():
        monkeypatch.setattr(forecast, name, value)
    _, _, words = run(steps=50)
    assert f"forecast after {after} steps of 2000 ms" in words


def test_the_nearer_bound_ends_the_run():
    costs = Costs(step=1.0, evaluation=10.0, batches=4, saving=5.0)
    train = TrainConfig(max_steps=100, max_seconds=60.0, eval_every=10, eval_batches=2, save_every=50)
    each = 1.0 + 5.0 / 10 + 5.0 / 50
    steps, seconds = end_of_run(train, 20, 18.0, costs)
    assert steps == pytest.approx(20 + (60 - 10 - 18) / each)
    assert seconds == pytest.approx(60 + 5)
    train.max_steps = 30
    assert end_of_run(train, 20, 18.0, costs) == pytest.approx((30, 18 + 10 * each + 10 + 5))
    train.max_steps, train.max_seconds, train.eval_batches = 30, None, 99  # no more batches than there are
    assert end_of_run(train, 30, 18.0, costs) == pytest.approx((30, 18 + 10 + 5))
    costs = costs._replace(epochs=0.1)
    assert end_of_run(train, 20, 0.0, costs)[1] == pytest.approx(10 * (1 + 1 + 0.1 + 1) + 15)


def test_steps_without_a_label_and_rows_that_grow_are_forecast_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forecast, "peak_memory", lambda device: [1000])
    config = small_config("data.start_length=4", steps=31)
    (labelled,) = make_loader(config).next_step()
    batch = labelled | {"labels": torch.full_like(labelled["labels"], -100)}
    loader = ListLoader([[labelled], [batch]])
    loader.length = 4
    trainer = make_trainer(tmp_path, config, loader=loader)
    trainer.run()
    words = capsys.readouterr().out
    assert "forecast after 30 steps" in words and "longer rows will make slower" in words
    assert trainer.forecast.made[2] == 1000 + longest_rows(config, 4, 4, "cpu") > 1000


def test_durations_have_the_unit_that_fits():
    words = [duration(seconds) for seconds in (3, 119.9, 120, 7199, 7200)]
    assert words == ["3.0 seconds", "119.9 seconds", "2.0 minutes", "120.0 minutes", "2.0 hours"]


def test_memory_of_rows_that_grow_is_that_of_the_longest():
    """By hand: a block of 64 queries keeps the scores of all keys up to its own end, for each head."""
    config = load_config("dense", [])
    config.model.vocab_size = 4096
    rows, heads, layers = 4, 6, 4
    short = 8 * rows * heads * 64 * 64
    long = rows * heads * sum(64 * 64 * block for block in range(1, 9))
    tables = 2 * 4 * 32 * (512 - 64)  # cos and sin
    assert longest_rows(config, 64, 4, "cpu") == 4 * layers * (long - short) + tables
    assert longest_rows(config, 512, 4, "cpu") == 0
    config.train.gradient_checkpointing = True  # the scores of the one layer that runs again
    assert longest_rows(config, 64, 4, "cpu") == 4 * (long - short) + tables
