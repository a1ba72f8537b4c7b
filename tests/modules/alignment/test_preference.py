"""The losses on pairs against TRL's: value and gradient, from random log-probabilities of uneven answers."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from modules.alignment.preference import answer_scores, bradley_terry, log_odds, pair_loss

PAIRS, TOKENS = 5, 7


def material(seed=0):
    """Log-probabilities (2 P, T) that want a gradient, those of a reference, and a mask: all chosen answers,
    then all rejected ones, of 1 to T tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2 * PAIRS, TOKENS)
    logprobs, reference = -0.01 - 4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, TOKENS + 1, (2 * PAIRS, 1), generator=generator)
    lengths[0], lengths[1] = 1, TOKENS
    return logprobs.requires_grad_(), reference, torch.arange(TOKENS) < lengths


def ours(kind, logprobs, reference, mask, beta, margin):
    chosen, rejected = answer_scores(kind, logprobs, mask, reference).chunk(2)
    return pair_loss(kind, chosen, rejected, beta, margin).mean()


def alone():
    """TRL's accelerator of a single process."""
    return SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def trl_with_reference(loss_type, logprobs, reference, mask, beta):
    """`DPOTrainer._compute_loss` on a model that returns these log-probabilities."""
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DPOTrainer

    nothing = torch.zeros_like(logprobs)
    output = SimpleNamespace(
        log_probs=logprobs * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=alone(), beta=beta, precompute_ref_logps=True,
        ld_alpha=None, aux_loss_enabled=False, f_divergence_type="reverse_kl", loss_types=[loss_type],
        loss_weights=[1.0], use_weighting=False, _total_train_tokens=0, _metrics={"eval": defaultdict(list)},
    )  # fmt: skip
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], dim=1)  # a prompt of one
    names, sums = ("ref_chosen_logps", "ref_rejected_logps"), (reference * mask).sum(1).chunk(2)
    inputs = {"input_ids": whole, "attention_mask": whole, "completion_mask": whole, **dict(zip(names, sums))}
    return DPOTrainer._compute_loss(trainer, lambda **given: output, inputs, False)


def trl_simpo(logprobs, mask, beta, margin):
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(accelerator=alone(), alpha=0.0, beta=beta, simpo_gamma=margin,
                              loss_type="simpo", label_smoothing=0.0)  # fmt: skip
    means = [(part * some).sum(1) / some.sum(1) for part, some in zip(logprobs.chunk(2), mask.chunk(2))]
    return CPOTrainer.cpo_loss(trainer, *means)[0].mean()


def trl_orpo(logprobs, mask, beta):
    """The odds ratio is TRL's. Its likelihood term is a mean over all tokens of the batch, prompts too; ours,
    as the paper's, one over the tokens of each chosen answer."""
    pytest.importorskip("trl")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    means = [(part * some).sum(1) / some.sum(1) for part, some in zip(logprobs.chunk(2), mask.chunk(2))]
    trainer = SimpleNamespace(accelerator=alone(), beta=beta)
    return -means[0].mean() - ORPOTrainer.odds_ratio_loss(trainer, *means)[0].mean()


CASES = [("dpo", 0.1), ("dpo", 0.7), ("ipo", 0.1), ("simpo", 2.0), ("orpo", 0.3)]


@pytest.mark.slow  # to import TRL
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_value_and_gradient_equal_trl(kind, beta, seed):
    logprobs, reference, mask = material(seed)
    margin = 0.8
    theirs = {
        "dpo": lambda: trl_with_reference("sigmoid", logprobs, reference, mask, beta),
        "ipo": lambda: trl_with_reference("ipo", logprobs, reference, mask, beta),
        "simpo": lambda: trl_simpo(logprobs, mask, beta, margin),
        "orpo": lambda: trl_orpo(logprobs, mask, beta),
    }[kind]()
    (expected,) = torch.autograd.grad(theirs, logprobs)
    loss = ours(kind, logprobs, reference, mask, beta, margin)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    bound = 1e-6 if kind == "orpo" else 1e-12  # TRL's odds ratio is in fp32
    assert loss.item() == pytest.approx(theirs.item(), rel=bound, abs=bound)
    assert torch.allclose(gradient, expected, rtol=bound, atol=bound)
    assert gradient[mask].all() and not gradient[~mask].any()  # every token of every answer, and no other


@pytest.mark.slow
def test_a_reward_model_against_trl():
    pytest.importorskip("trl")
    from trl.trainer.reward_trainer import RewardTrainer

    rewards = torch.randn(2 * PAIRS, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rewards.requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=alone(), _total_train_tokens=0, _metrics={"eval": defaultdict(list)},
    )  # fmt: skip
    theirs = RewardTrainer.compute_loss(trainer, lambda **given: SimpleNamespace(logits=rewards), {})
    loss = bradley_terry(*rewards[:, 0].chunk(2)).mean()
    (expected,), (gradient,) = (torch.autograd.grad(one, rewards) for one in (theirs, loss))
    assert torch.equal(loss, theirs) and torch.equal(gradient, expected)
    accuracy = trainer._metrics["eval"]["accuracy"][0]
    assert accuracy == pytest.approx((rewards[:PAIRS] > rewards[PAIRS:]).double().mean().item())


def test_the_first_loss():
    """Policy and reference are the same: ln 2 for any answers, and IPO's distance from its goal."""
    logprobs, _, mask = material()
    same = logprobs.detach()
    at_first = {kind: ours(kind, logprobs, same, mask, 0.1, 0.0).item() for kind in ("dpo", "ipo")}
    assert at_first["dpo"] == pytest.approx(math.log(2), abs=1e-15)
    assert at_first["ipo"] == pytest.approx(25.0)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo"])
def test_edges(kind):
    """An answer of probability 1, one of almost 0, and an empty one: finite values and gradients; the
    reference gets no gradient."""
    logprobs = torch.tensor([[0.0, 0.0], [-300.0, -200.0], [-1.0, -2.0], [-1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 1], [0, 0], [1, 0]], dtype=torch.bool)
    chosen, rejected = answer_scores(kind, logprobs, mask, torch.zeros(4, 2)).view(2, 2).unbind(1)
    loss = pair_loss(kind, chosen, rejected, 0.5, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all() and not logprobs.grad[2].any()


def test_log_odds():
    p = torch.tensor([1e-30, 1e-3, 0.5, 0.9, 0.9999], dtype=torch.float64)
    assert torch.allclose(log_odds(p.log()), (p / (1 - p)).log(), rtol=1e-9, atol=1e-15)


def test_swapped_answers_are_unlearned():
    """Gradient steps raise the chosen answer against the rejected one; with the two swapped they lower it."""
    for kind in ("dpo", "ipo", "simpo", "orpo"):
        margins = []
        for swapped in (False, True):
            weights = torch.zeros(2, 3, requires_grad=True)  # two answers of three tokens, p = 1/2 each
            mask, reference = torch.ones(2, 3, dtype=torch.bool), torch.full((2, 3), 0.5).log()
            for _ in range(20):
                scores = answer_scores(kind, torch.nn.functional.logsigmoid(weights), mask, reference)
                chosen, rejected = (scores[None, number] for number in ((1, 0) if swapped else (0, 1)))
                (slope,) = torch.autograd.grad(pair_loss(kind, chosen, rejected, 0.5, 1.0).sum(), weights)
                weights = (weights - 0.1 * slope).detach().requires_grad_()
            margins.append((weights[0] - weights[1]).sum().item())
        assert margins[0] > 0.1 and margins[1] == pytest.approx(-margins[0], rel=1e-5)
