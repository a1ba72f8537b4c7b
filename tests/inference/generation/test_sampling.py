"""Filters against the logits processors of `transformers`; draws against their probabilities."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.generation.sampling import Sampler, SamplingParams, draw, filtered_probs, row_seed
from utils.errors import UserError

FILTERS = {
    "none": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.2},
    "top-k": {"top_k": 5},
    "top-k of 1": {"top_k": 1},
    "top-k beyond the vocabulary": {"top_k": 1000},
    "top-p": {"top_p": 0.6},
    "top-p so small that one token stays": {"top_p": 1e-6},
    "min-p": {"min_p": 0.2},
    "min-p of 1": {"min_p": 1.0},
    "penalty": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.7},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    "flat, then cut": {"temperature": 3.0, "top_k": 12, "top_p": 0.5},
}


def their_probs(logits, params, history):
    """The same filters by `transformers`, in the order in which its `generate` applies them."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    steps.append(TopPLogitsWarper(params.top_p))
    steps.append(MinPLogitsWarper(params.min_p))
    return steps(history, logits).softmax(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_transformers(name, dtype):
    params = SamplingParams(**FILTERS[name])
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, 97)).to(dtype)
    history = torch.randint(0, 97, (6, 30))
    seen = torch.zeros(6, 97, dtype=torch.bool).scatter_(1, history, True)
    ours = filtered_probs(logits, params, seen)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    theirs = their_probs(wide, params, history)
    assert ours.dtype == wide.dtype
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs)


def test_greedy_is_certain_of_the_likeliest():
    logits = torch.tensor([[0.1, 2.0, 1.9], [3.0, -1.0, 2.9]])
    probs = filtered_probs(logits, SamplingParams(temperature=0))
    assert probs.tolist() == [[0, 1, 0], [1, 0, 0]]
    penalty = SamplingParams(temperature=0, repetition_penalty=2.0)
    seen = torch.tensor([[False, True, False], [True, False, False]])
    assert filtered_probs(logits, penalty, seen).argmax(dim=1).tolist() == [2, 2]


def test_extreme_logits_give_no_nan():
    logits = torch.tensor([[1e30, -1e30, 0.0], [-math.inf, 0.0, 0.0]])
    for changes in FILTERS.values():
        probs = filtered_probs(logits, SamplingParams(**changes), torch.zeros(2, 3, dtype=torch.bool))
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(2))


def test_draws_follow_the_probabilities():
    """Pearson's chi-square of 40000 draws with 19 degrees of freedom stays below its 99.9 % point."""
    torch.manual_seed(0)
    probs = filtered_probs(torch.randn(1, 30), SamplingParams(top_k=20))
    count = 40_000
    generator = torch.Generator().manual_seed(1)
    tokens = draw(probs.expand(count, -1), 1 - torch.rand(count, 1, generator=generator))
    found = torch.bincount(tokens, minlength=30).double()
    expected = probs[0].double() * count
    possible = expected > 0
    assert possible.sum() == 20 and found[~possible].sum() == 0
    chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < 43.8  # scipy.stats.chi2.ppf(0.999, 19)


def test_the_ends_of_the_unit_interval_draw_only_what_is_possible():
    probs = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]]).expand(3, -1)
    assert draw(probs, torch.tensor([[2.0**-24], [0.5], [1.0]])).tolist() == [2, 2, 4]


def test_sampler_draws_like_torch_multinomial_in_the_mean():
    """Through the whole sampler, one generator per row: mean and frequency of a small distribution."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    params = SamplingParams(seed=3)
    rows = 3000
    sampler = Sampler(params, [[0]] * rows, 3, "cpu")
    found = torch.bincount(torch.tensor(sampler.pick(logits.expand(rows, -1))), minlength=3) / rows
    torch.testing.assert_close(found, logits[0].softmax(dim=0), atol=0.03, rtol=0)


def test_row_b_draws_as_a_single_row_with_its_own_seed():
    torch.manual_seed(0)
    steps = torch.randn(5, 4, 50)  # 5 steps of 4 rows
    together = Sampler(SamplingParams(seed=7), [[0]] * 4, 50, "cpu")
    batch = [together.pick(logits) for logits in steps]
    for row in range(4):
        alone = Sampler(SamplingParams(seed=row_seed(7, row)), [[0]], 50, "cpu")
        assert [alone.pick(logits[row : row + 1])[0] for logits in steps] == [tokens[row] for tokens in batch]
    other = Sampler(SamplingParams(seed=100), [[0]] * 4, 50, "cpu")
    assert [other.pick(logits) for logits in steps] != batch


def test_no_two_rows_draw_the_same():
    """Of ten seeds with ten rows each: neither seeds nor rows of one seed share their numbers."""
    drawn = []
    for seed in range(10):
        sampler = Sampler(SamplingParams(seed=seed), [[0]] * 10, 50, "cpu")
        drawn += [torch.rand(3, generator=generator).tolist() for generator in sampler.generators]
    assert len(set(map(tuple, drawn))) == 100
    SamplingParams(seed=row_seed(2**62 - 1, 2**62))  # every row seed is a seed


def test_a_temperature_near_zero_is_greedy():
    """Division by the smallest numbers of fp32 gives infinities; the limit is the likeliest token."""
    logits = torch.tensor([[0.1, 20.0, 19.9], [-5.0, -60.0, -5.1]])
    for temperature in (1e-45, 5e-324, 1e-38, 1e-20):
        sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.9), [[0]] * 2, 3, "cpu")
        assert sampler.pick(logits) == [1, 0]


def test_the_penalty_spares_stop_tokens():
    """A past answer ends with one; with a penalty each later answer would find it harder to end."""
    params = SamplingParams(temperature=0, repetition_penalty=10.0)
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert Sampler(params, [[3, 2]], 4, "cpu", stop_ids={3}).pick(logits) == [3]
    assert Sampler(params, [[3, 2]], 4, "cpu").pick(logits) == [1]


def test_the_penalty_knows_the_prompt_and_what_was_picked():
    params = SamplingParams(temperature=0, repetition_penalty=10.0)
    sampler = Sampler(params, [[3, 3]], 4, "cpu")
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert [sampler.pick(logits)[0] for _ in range(4)] == [2, 1, 0, 3]


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.nan), ("max_new_tokens", 0), ("seed", -1),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(name, value):
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})
