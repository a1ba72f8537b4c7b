"""Advantages against loops over the standard library's `statistics`, known values, and torchrl."""

import statistics

import pytest
import torch

from modules.alignment.advantage import gae, group_advantages, whiten
from tests.modules.alignment.oracles import torchrl_gae
from tests.modules.alignment.tools import fp64, random_mask

SLOW = {  # the advantage of sample i among the rewards of its prompt
    "reward": lambda group, i: group[i],
    "mean": lambda group, i: group[i] - statistics.fmean(group),
    "mean_std": lambda group, i: (group[i] - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4),
    "leave_one_out": lambda group, i: group[i] - statistics.fmean(group[:i] + group[i + 1 :]),
}


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("shape", [(5, 4), (1, 8), (3, 2), (4, 4)])
def test_each_answer_is_compared_with_its_own_prompt(kind, shape):
    """Rewards of prompts differ in level and scale, so that a group mixed from two prompts is seen."""
    generator = torch.Generator().manual_seed(0)
    level = 10.0 ** torch.arange(shape[0], dtype=torch.float64)[:, None]
    rewards = fp64(generator, *shape) * level + level
    slow = [[SLOW[kind](group, i) for i in range(len(group))] for group in rewards.tolist()]
    found = group_advantages(rewards, kind)
    # Subtracting the mean rounds to a unit of the reward.
    assert ((found - torch.tensor(slow, dtype=torch.float64)).abs() <= 1e-12 * level.clamp(min=1)).all()


def test_known_values():
    known = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), "mean_std")
    assert torch.allclose(known, torch.tensor([[0.8659, -0.8659, -0.8659, 0.8659]]), atol=5e-5)


@pytest.mark.parametrize("kind", ["mean", "mean_std", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(kind):
    """The mean of seven times 0.1 is not 0.1 in fp32, and GRPO divides the difference by 1e-4."""
    rewards = torch.full((2, 7), 0.1)
    assert rewards.mean(dim=1)[0] != rewards[0, 0]
    assert not group_advantages(rewards, kind).any()


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0)])
def test_gae_equals_the_sum_over_deltas(gamma, lam):
    """Of the tokens under the mask alone, row by row."""
    generator = torch.Generator().manual_seed(1)
    mask = random_mask(generator)
    rewards, values = fp64(generator, *mask.shape), fp64(generator, *mask.shape)
    mask[3] = False  # a row without a token
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        r, v = rewards[row][mask[row]], values[row][mask[row]]
        found = advantages[row][mask[row]], returns[row][mask[row]]
        after = torch.cat([v[1:], v.new_zeros(1)])[: len(v)]
        delta = r + gamma * after - v
        slow = [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(v))]
        slow = torch.tensor(slow, dtype=torch.float64)
        torch.testing.assert_close(found, (slow, slow + v), rtol=0, atol=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


@pytest.mark.parametrize("tokens", [1, 6])
def test_gae_equals_torchrl(tokens):
    generator = torch.Generator().manual_seed(5)
    rewards, values = fp64(generator, 1, tokens), fp64(generator, 1, tokens)
    found = gae(rewards, values, torch.ones(1, tokens, dtype=torch.bool), 0.97, 0.9)
    theirs = torchrl_gae(rewards[0], values[0], 0.97, 0.9)
    torch.testing.assert_close(tuple(each[0] for each in found), theirs, rtol=0, atol=1e-12)


def test_lambda_one_is_the_sum_of_rewards():
    """Monte Carlo: the critic is only a baseline. What the critic says of padding is nowhere."""
    generator = torch.Generator().manual_seed(2)
    rewards, values = fp64(generator, 2, 6), fp64(generator, 2, 6).requires_grad_()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_go = torch.stack([rewards[:, t:].where(mask[:, t:], 0).sum(1) for t in range(6)], dim=1)
    torch.testing.assert_close(returns, to_go.where(mask, 0), rtol=0, atol=1e-12)
    assert not advantages.requires_grad and not returns.requires_grad


def slow_whiten(values):
    mean, variance = statistics.fmean(values), statistics.variance(values)
    return [(value - mean) / (variance + 1e-8) ** 0.5 for value in values]


def test_whitening_equals_the_published_form():
    """(x - mean) / sqrt(var + 1e-8), unbiased, as in TRL 0.19's PPO."""
    generator = torch.Generator().manual_seed(3)
    mask = random_mask(generator)
    x = fp64(generator, *mask.shape) * 3 + 50
    slow = torch.zeros_like(x)
    slow[mask] = torch.tensor(slow_whiten(x[mask].tolist()), dtype=torch.float64)
    torch.testing.assert_close(whiten(x, mask), slow, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_whitening_of_nothing_one_and_equal_numbers(tokens):
    mask = torch.arange(6)[None] < tokens
    found = whiten(torch.full((1, 6), 0.1), mask)
    # The mean of 0.1 is off by its rounding at most, 1e-8, and is divided by 1e-4.
    assert torch.isfinite(found).all() and found.abs().max() < 1e-3
