"""The losses on pairs with real models: against an obvious loop, at the first step, and what mistakes do."""

import copy
import math

import numpy as np
import pytest
import torch

from config.preference import DPOConfig
from inference.generation.reward import RewardModel
from load_data.chat.chat_data import Samples
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.pairs import Pair, PairLoader, as_rows, eval_pair_batches
from load_data.loader import IGNORED
from model.scalar import ScalarModel
from tests.inference.tools import byte_tokenizer, tiny_model
from tests.modules.tools import shake
from tests.train.tools import machine
from train.engine.preference_loss import (
    PairEvaluation, PairSource, PreferenceLoss, RewardLoss, label_logprobs, last_scores,
)  # fmt: skip

TEMPLATE = ChatTemplate(byte_tokenizer())
END, BREAK = TEMPLATE.end_of_turn
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}


def some_pairs(count=6, swapped=False):
    """Pairs whose chosen answers are of small ids, with prompts and answers of 1 to 9 tokens."""
    rng, pairs = np.random.default_rng(4), []
    for number in range(count):
        prompt = rng.integers(5, 250, rng.integers(1, 9)).tolist()
        lengths = rng.integers(0, 9, 2)
        answers = [rng.integers(20, 90, lengths[0]).tolist(), rng.integers(120, 250, lengths[1]).tolist()]
        answers = [[*answer, END] for answer in answers]
        answers[1] = answers[1][: None if number % 2 or len(answers[1]) == 1 else -1]  # some were cut
        pairs.append(Pair(prompt, *(reversed(answers) if swapped else answers)))
    return pairs


def samples_of(pairs):
    rows = [row for pair in pairs for row in as_rows(pair, BREAK)]
    return Samples(*map(np.concatenate, zip(*rows)), np.array([len(row.ids) for row in rows]))


def batch_of(pairs):
    (batch,) = eval_pair_batches(samples_of(pairs), 32, len(pairs), None, pad_id=3)
    return batch


def obvious_sums(model, pairs):
    """The log-probability of each answer, row by row and token by token, without padding: (P, 2)."""
    sums = []
    for prompt, *answers in pairs:
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer]])
            logprobs = model(ids).logits.log_softmax(-1)[0]
            places = range(len(prompt), len(prompt) + len(answer))
            sums.append(sum(logprobs[place - 1, ids[0, place]] for place in places))
    return torch.stack(sums).view(-1, 2)


@pytest.mark.parametrize("changes", [{}, MOE, {"final_logit_softcapping": 5.0, "mtp": "parallel"}], ids=str)
def test_logprobs_and_dpo_against_an_obvious_loop(changes):
    """Value and gradient in fp64; a lost end token, or one of the prompt, would show."""
    policy, reference = (tiny_model(seed, **changes).double() for seed in (1, 2))
    pairs = some_pairs()
    batch = batch_of(pairs)
    sums = obvious_sums(policy, pairs)
    found = label_logprobs(policy, batch)
    assert torch.allclose(found.sum(1).view(-1, 2), sums, atol=1e-10, rtol=0)
    assert not found[batch["labels"] == IGNORED].any()
    held = obvious_sums(reference, pairs).detach()
    margin = 0.3 * ((sums[:, 0] - held[:, 0]) - (sums[:, 1] - held[:, 1]))
    expected = -margin.sigmoid().log().sum() / 10 - 0.5 * sum(
        total / len(pair.chosen) for total, pair in zip(sums[:, 0], pairs)
    ) / 10
    loss = PreferenceLoss(DPOConfig(beta=0.3, likelihood=0.5), reference)
    terms, measures = loss(policy, batch, 10.0)
    assert sum(terms.values()).item() == pytest.approx(expected.item(), abs=1e-10)
    assert measures["margin"].item() == pytest.approx(margin.sum().item() / 10, abs=1e-10)
    assert measures["acc"].item() == (margin > 0).sum().item() / 10
    slopes = [
        torch.autograd.grad(value, [policy.lm_head.weight, policy.model.norm.weight])
        for value in (sum(terms.values()), expected)
    ]
    for ours, obvious in zip(*slopes):
        assert torch.allclose(ours, obvious, atol=1e-10, rtol=0) and ours.any()
    assert all(weight.grad is None for weight in reference.parameters())


def test_the_first_loss_is_ln_2_and_dropout_would_move_it():
    policy = tiny_model(3, dropout=0.1).train()
    batch = batch_of(some_pairs())
    for kind, first in (("dpo", math.log(2)), ("ipo", 25.0)):
        loss = PreferenceLoss(DPOConfig(kind), copy.deepcopy(policy).eval())
        terms, measures = loss(policy.eval(), batch, 6.0)
        assert terms[kind].item() == pytest.approx(first, abs=1e-6) and measures["margin"] == 0
    loss = PreferenceLoss(DPOConfig(), copy.deepcopy(policy).eval())
    _, measures = loss.compare(policy.train(), batch)
    assert measures["margin"].abs().max() > 0.01  # why the stage sets model.dropout to 0


def test_under_autocast_the_head_stays_in_fp32():
    """The logits of a confident model in bf16 are off by up to 1/16, which would drown the margins."""
    model, batch = tiny_model(1), batch_of(some_pairs())
    with torch.no_grad():
        model.lm_head.weight *= 8
        with torch.autocast("cpu", torch.bfloat16):
            found = label_logprobs(model, batch)
            hidden = model(batch["input_ids"], padding_mask=batch["padding_mask"]).hidden.float()
        logprobs = model.logits(hidden).log_softmax(-1)
    expected = logprobs.gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0]
    keep = batch["labels"] != IGNORED
    assert torch.allclose(found[keep], expected[keep], atol=1e-4)


@pytest.mark.parametrize("swapped", [False, True])
def test_training_orders_the_pairs_as_they_are_given(swapped):
    """Chosen and rejected swapped in training lower the accuracy on what was meant, for policy and reward."""
    meant = samples_of(some_pairs(12))
    samples = samples_of(some_pairs(12, swapped))
    held_out = lambda bound: eval_pair_batches(meant, 32, 5, bound, pad_id=0)  # noqa: E731
    for kind in ("dpo", "ipo", "simpo", "orpo", "reward"):
        policy = tiny_model(5)
        model, loss = policy, PreferenceLoss(DPOConfig(kind, margin=0.5), copy.deepcopy(policy))
        if kind == "reward":
            model, loss = ScalarModel.from_policy(policy), RewardLoss()
        before = copy.deepcopy(model.state_dict())
        source = PairSource(PairLoader(samples, 32, 4, packing=False, pad_id=0))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(25):
            step = source.next_step()
            assert step.weight == 4
            terms, _ = loss(model, step.micro_batches[0], step.weight)
            optimizer.zero_grad(), sum(terms.values()).backward(), optimizer.step()
        evaluation = PairEvaluation(held_out, 12, 5, loss, machine())
        assert evaluation.batches == 3
        with torch.no_grad():
            values = evaluation(model, None)
        assert values["val_acc"] <= 0.1 if swapped else values["val_acc"] >= 0.9, kind
        assert values["val_margin"] < 0 if swapped else values["val_margin"] > 0
        assert any(not torch.equal(before[name], part) for name, part in model.state_dict().items())


def test_a_reward_is_read_at_the_last_token_of_the_answer():
    """Padding does not matter, the end token does; the loaded form gives the same numbers in any order."""
    model = shake(ScalarModel.from_policy(tiny_model(2)), 7).double().eval()
    pairs = some_pairs()
    found = last_scores(model, batch_of(pairs))
    rows = [(pair.prompt, answer) for pair in pairs for answer in pair[1:]]
    alone = torch.stack([model(torch.tensor([[*prompt, *answer]]))[0, -1] for prompt, answer in rows])
    assert torch.allclose(found, alone, atol=1e-10, rtol=0)
    reward = RewardModel(model)
    assert torch.allclose(reward(*zip(*rows)), alone.float(), atol=1e-6)
    assert torch.allclose(reward(*zip(*rows[::-1])), alone.flip(0).float(), atol=1e-6)
    ended, cut = reward([[5, 6]] * 2, [[30, 31, END], [30, 31]])
    assert ended != cut
    terms, _ = RewardLoss()(model, batch_of(pairs), 6.0)
    gaps = alone[::2] - alone[1::2]
    assert terms["bt"].item() == pytest.approx(-gaps.sigmoid().log().mean().item(), abs=1e-10)


def test_evaluation_measures_part_or_all_and_counts_each_pair_once():
    policy, reference = tiny_model(1), tiny_model(2)
    samples = samples_of(pairs := some_pairs(7))
    held_out = lambda bound: eval_pair_batches(samples, 32, 2, bound, pad_id=0)  # noqa: E731
    loss = PreferenceLoss(DPOConfig(), reference)
    evaluation = PairEvaluation(held_out, 7, 2, loss, machine())
    with torch.no_grad():
        values, part = evaluation(policy, None), evaluation(policy, 1)
        expected, measures = loss(policy, batch_of(pairs), 7.0)
    assert values["val_loss"] == pytest.approx(expected["dpo"].item(), rel=1e-5)
    for name in ("margin", "acc", "chosen", "rejected"):
        assert values[f"val_{name}"] == pytest.approx(measures[name].item(), rel=1e-5)
    assert part["val_loss"] != values["val_loss"]
