"""The policy-gradient losses against TRL's trainer, value and gradient, in fp64."""

from dataclasses import replace

import pytest
import torch

from config.rl import RECIPES, Recipe
from modules.alignment.kl import kl_estimate
from modules.alignment.policy_gradient import aggregated, log_ratio, objective, weight_of
from tests.modules.alignment.oracles import trl_grpo_loss
from tests.modules.alignment.tools import fp64, random_mask

LONGEST = 13  # tokens allowed; rows are shorter
CASES = {  # our recipe, how far the policy has moved, TRL's loss_type, epsilon_low, epsilon_high, and others
    "grpo": (RECIPES["grpo"], 0.3, "grpo", 0.2, 0.2, {"beta": 0.04}),
    "grpo without kl": (replace(RECIPES["grpo"], kl_weight=0.0), 0.3, "grpo", 0.2, 0.2, {}),
    "bnpo": (Recipe("mean_std"), 0.3, "bnpo", 0.2, 0.2, {}),
    "dr_grpo": (RECIPES["dr_grpo"], 0.3, "dr_grpo", 0.2, 0.2, {}),
    "dapo": (RECIPES["dapo"], 0.3, "dapo", 0.2, 0.28, {}),
    "cispo": (RECIPES["cispo"], 1.5, "cispo", None, 5.0, {}),
    "gspo": (RECIPES["gspo"], 1e-3, "grpo", 3e-4, 4e-4, {"level": "sequence"}),
}


def our_loss(recipe, logprobs, old, advantages, mask, reference=None, weight=None):
    """The pieces put together, and the share that is clipped."""
    ratio = log_ratio(logprobs, old, mask, recipe.ratio) if recipe.ratio != "none" else None
    per_token, clipped = objective(logprobs, ratio, advantages, recipe)
    if recipe.kl_weight:
        per_token = per_token + recipe.kl_weight * kl_estimate(logprobs, reference, recipe.kl)
    weight = weight or weight_of(mask, recipe.aggregation, LONGEST)
    return aggregated(per_token, mask, recipe.aggregation) / weight, clipped


def random_step(seed, spread, rows=7):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(generator, rows)
    old = fp64(generator, *mask.shape) - 2
    logprobs = (old + spread * fp64(generator, *mask.shape)).requires_grad_()
    reference = old + 0.3 * fp64(generator, *mask.shape)
    advantages = fp64(generator, rows, 1).expand_as(mask).clone()
    return logprobs, old, advantages, mask, reference


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_trl(name):
    recipe, spread, loss_type, low, high, others = CASES[name]
    logprobs, old, advantages, mask, reference = step = random_step(0, spread)
    settings = {"loss_type": loss_type, "epsilon_low": low, "epsilon_high": high} | others
    theirs, metrics = trl_grpo_loss(*step, LONGEST, **settings)
    (their_gradient,) = torch.autograd.grad(theirs, logprobs)
    ours, clipped = our_loss(recipe, *step)
    (gradient,) = torch.autograd.grad(ours, logprobs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-10, atol=1e-14)
    assert clipped[mask].any() and not clipped[mask].all(), "both sides of the clip must be tested"
    if recipe.clip == "ppo":  # TRL counts CISPO's tokens only where A > 0, in fp32
        assert abs(clipped[mask].double().mean() - metrics["clip_ratio/region_mean"][0]) < 1e-6


def test_reinforce_is_the_likelihood_weighted_by_the_advantage():
    logprobs, old, advantages, mask, _ = random_step(1, 0.3)
    ours, clipped = our_loss(replace(RECIPES["rloo"], kl_weight=0), logprobs, old, advantages, mask)
    (gradient,) = torch.autograd.grad(ours, logprobs)
    torch.testing.assert_close(gradient, (-advantages / (7 * LONGEST)).where(mask, 0), rtol=1e-12, atol=0)
    assert not clipped.any()


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole(name):
    """Also with a row without a token, which counts for nothing whatever its numbers are."""
    recipe = RECIPES[name]
    step = random_step(2, 1e-3 if name == "gspo" else 0.3)
    (whole,) = torch.autograd.grad(our_loss(recipe, *step)[0], step[0])
    empty = [torch.full((1, 9), fill) for fill in (-30.0, -3.0, 2.0, 0, 7.0)]
    logprobs, old, advantages, mask, reference = (
        torch.cat([a.detach(), b.to(a.dtype)]) for a, b in zip(step, empty, strict=True)
    )
    logprobs.requires_grad_()
    parts = [slice(0, 1), slice(1, 6), slice(6, 8), slice(7, 8)]  # the last has no token at all
    weight = sum(weight_of(mask[part], recipe.aggregation, LONGEST) for part in parts)
    for part in parts:
        rows = (each[part] for each in (logprobs, old, advantages, mask, reference))
        loss, clipped = our_loss(recipe, *rows, weight=weight)
        assert torch.isfinite(loss)
        loss.backward()
    torch.testing.assert_close(logprobs.grad[:7], whole, rtol=1e-12, atol=1e-15)
    assert not logprobs.grad[7].any() and not clipped.any() and loss == 0


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_policy_gets_a_gradient(name):
    """Neither advantages nor the old policy nor the reference may be trained through the loss."""
    logprobs, old, advantages, mask, reference = random_step(3, 0.3)
    others = [each.requires_grad_() for each in (old, advantages, reference)]
    our_loss(RECIPES[name], logprobs, old, advantages, mask, reference)[0].backward()
    assert logprobs.grad[mask].any() and all(each.grad is None for each in others)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("rft", "rloo")])
def test_the_first_update_is_a_plain_policy_gradient(name):
    """On policy all ratios are 1: nothing is clipped, and the gradient is that of -A logprobs."""
    recipe = replace(RECIPES[name], kl_weight=0.0)
    old, _, advantages, mask, _ = random_step(4, 0.3)
    logprobs = old.detach().clone().requires_grad_()
    ratio = log_ratio(logprobs, old, mask, recipe.ratio)
    per_token, clipped = objective(logprobs, ratio, advantages, recipe)
    (gradient,) = torch.autograd.grad(aggregated(per_token, mask, "sequence"), logprobs)
    plain = (-advantages / mask.sum(1, keepdim=True)).where(mask, 0)
    torch.testing.assert_close(gradient, plain, rtol=1e-12, atol=1e-15)
    assert not ratio.any() and not clipped.any()


@pytest.mark.parametrize("kind", ["sequence", "token", "constant"])
def test_length_bias(kind):
    """Dr. GRPO's point in numbers. A policy knows three answers: right in 4 tokens, wrong in 2, wrong in 20.
    Nothing in the reward prefers one wrong answer. Under the mean over the row the long one takes over."""
    lengths, rewards = torch.tensor([4, 2, 20]), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    mask = torch.arange(20) < lengths[:, None]
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    recipe = Recipe("mean", ratio="none", clip="none", aggregation=kind)

    def wrong_length():
        chance = logits.detach().softmax(0)[1:]
        return float((chance * lengths[1:]).sum() / chance.sum())

    for _ in range(300):
        policy = logits.log_softmax(0)
        chance = policy.detach().exp()
        # The first token chooses the answer, the others follow. Rows count as often as they are sampled.
        logprobs = torch.cat([policy[:, None], torch.zeros(3, 19, dtype=torch.float64)], dim=1)
        weighted = (chance * (rewards - chance @ rewards))[:, None].expand(3, 20)
        loss = aggregated(objective(logprobs, None, weighted, recipe)[0], mask, kind)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (true,) = torch.autograd.grad(-(policy.exp() @ rewards), logits)
        if kind != "sequence":
            torch.testing.assert_close(gradient, true, rtol=1e-9, atol=1e-15)
        with torch.no_grad():
            logits -= gradient
    assert logits.softmax(0)[0] > 0.9, "all learn the right answer"
    # (2 + 20) / 2 without a preference
    assert wrong_length() > 15 if kind == "sequence" else wrong_length() == pytest.approx(11, abs=1e-6)
