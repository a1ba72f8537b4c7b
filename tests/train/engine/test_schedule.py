"""The learning rate against the schedules of `transformers` and against closed forms.

Convention: transformers' warmup begins with a rate of 0 (`step / warmup`), ours with 1 / (warmup + 1),
because a step with rate 0 is a step thrown away. Our step s of a warmup of w is thus theirs s + 1 of a warmup
of w + 1.
"""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from config.schema import OptimConfig
from train.engine.schedule import lr_factor, progress


def factors(schedule, steps, **changes):
    """Our factor at each step of a run bounded by steps."""
    optim = OptimConfig(schedule=schedule, **changes)
    return [lr_factor(optim, step, progress(step, steps)) for step in range(steps)]


def theirs(schedule_of, steps):
    """The rates of a schedule of transformers over an optimizer with lr 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = schedule_of(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("low", [0.0, 0.1])
def test_wsd_equals_transformers(low):
    """Warmup of 4, decay over the last 40 of 100 steps. With a `low` above 0 transformers' warmup begins
    there and ours at 0: compared after it."""
    ours = factors("wsd", 100, warmup_steps=4, decay_fraction=0.4, min_lr_ratio=low)
    expected = theirs(
        lambda optimizer: get_wsd_schedule(
            optimizer, num_warmup_steps=5, num_decay_steps=40, num_stable_steps=56, decay_type="linear",
            min_lr_ratio=low,
        ), 101,
    )[1:]  # fmt: skip
    first = 4 if low else 0
    assert ours[first:] == pytest.approx(expected[first:], abs=1e-12)
    assert ours[60] == 1 and ours[61] < 1 and ours[3] < 1 and ours[4] == 1


def test_cosine_equals_transformers_where_nothing_warms_up():
    ours = factors("cosine", 50, warmup_steps=0)
    assert ours == pytest.approx(theirs(lambda o: get_cosine_schedule_with_warmup(o, 0, 50), 50), abs=1e-12)


def test_the_warmup_equals_that_of_transformers():
    """Theirs bends the cosine only after the warmup, ours along the whole run: compared within the warmup,
    undecayed."""
    ours = factors("cosine", 1000, warmup_steps=9, min_lr_ratio=1.0)[:20]
    expected = theirs(lambda o: get_cosine_schedule_with_warmup(o, 10, 10**9), 21)[1:]
    assert ours == pytest.approx(expected, abs=1e-9)
    assert ours[0] == 0.1 and ours[8] == 0.9 and ours[9] == 1  # never 0: no step is thrown away


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("cosine", lambda p: 0.2 + 0.8 * (1 + math.cos(math.pi * p)) / 2),
        ("exponential", lambda p: math.exp(p * math.log(0.2))),
        ("wsd", lambda p: 1.0 if p < 0.75 else 1 - 0.8 * (p - 0.75) / 0.25),
    ],
)
def test_closed_forms_and_the_end(schedule, formula):
    optim = OptimConfig(schedule=schedule, warmup_steps=0, min_lr_ratio=0.2, decay_fraction=0.25)
    for done in (0.0, 0.1, 0.5, 0.75, 0.9, 1.0):
        assert lr_factor(optim, 1000, done) == pytest.approx(formula(done))
    assert lr_factor(optim, 1000, 1.0) == pytest.approx(0.2)
    values = [lr_factor(optim, 1000, n / 100) for n in range(101)]
    assert values == sorted(values, reverse=True) and values[0] == 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_annealing_ends_at_zero_by_default(schedule):
    assert lr_factor(OptimConfig(schedule=schedule), 1000, 1.0) == pytest.approx(0, abs=1e-12)


def test_progress_is_the_bound_that_is_nearer():
    assert progress(5, 20) == 0.25
    assert progress(5, None, 30.0, 60.0) == 0.5
    assert progress(5, 20, 30.0, 60.0) == 0.5
    assert progress(15, 20, 30.0, 60.0) == 0.75
    assert progress(25, 20) == 1 and progress(1, 20, 61.0, 60.0) == 1


def test_a_run_bounded_by_time_anneals_on_a_slow_machine():
    """3 of 1000 steps were possible; the rate still goes down to its end."""
    optim = OptimConfig(schedule="wsd", warmup_steps=0, decay_fraction=1.0)
    rates = [lr_factor(optim, step, progress(step, 1000, 10.0 * step, 30.0)) for step in range(4)]
    assert rates == pytest.approx([1, 2 / 3, 1 / 3, 0])
