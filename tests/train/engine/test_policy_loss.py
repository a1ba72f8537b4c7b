"""The loss of a policy against the formulas, token by token, and what it stops."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from config.rl import RECIPES
from modules.experts.router import routing_codes
from tests.train.policies import MOE, losses, make_policy, make_run, rl_config, rollouts
from tests.train.tools import machine
from train.engine.policy_loss import PolicyLoss, token_logprobs
from utils.errors import UserError

WITHOUT_CRITIC = [name for name, recipe in RECIPES.items() if recipe.advantage != "gae"]


def scores(model, row, temperature):
    """The log-probability of each token of an answer, by a forward over the whole row."""
    logits = model(torch.tensor([row.prompt + row.answer])).logits[0, len(row.prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(row.answer)), row.answer]


def obvious_loss(rows, config, policy, models):
    """The loss of a step: each row by itself, each token by itself, the formulas as published."""
    recipe, rl, total = config.rl.chosen(), config.rl, 0.0
    sampled = sum(len(row.answer) for row in rows)
    for row in rows:
        now, A, n = scores(policy, row, rl.temperature), row.advantages, len(row.answer)
        old = torch.tensor(row.old, dtype=torch.float64)
        logs = now - old
        if recipe.ratio == "sequence":
            logs = logs.mean().repeat(n)
        each = []
        for t in range(n):
            r = logs[t].exp()
            if recipe.ratio == "none":
                term = -A[t] * now[t]
            elif recipe.clip == "cispo":
                term = -min(r.item(), recipe.clip_high) * A[t] * now[t]
            else:
                low, high = 1 - recipe.clip_low, 1 + recipe.clip_high
                term = -torch.minimum(r * A[t], r.clamp(low, high) * A[t])
            if recipe.kl_weight and recipe.kl_place == "loss":
                with torch.no_grad():
                    reference = scores(models["reference"], row, rl.temperature)[t]
                term = term + recipe.kl_weight * ((reference - now[t]).exp() - 1 - (reference - now[t]))
            each.append(term)
        weight = {"sequence": n * len(rows), "token": sampled, "constant": rl.max_new_tokens * len(rows)}
        total = total + sum(each) / weight[recipe.aggregation]
    return total


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_every_recipe_is_its_formula(name):
    """Value and gradient in fp64, on the second update of a rollout, whose policy has moved."""
    updates = 1 if RECIPES[name].ratio == "none" else 2
    config = rl_config(f"rl.recipe={name}", f"rl.updates={updates}", "rl.temperature=1.3")
    policy = make_policy(config, dtype=torch.float64)
    models = {"model": policy, "reference": make_policy(config, seed=1, dtype=torch.float64).eval()}
    source = rollouts(config, policy)
    step = source.next_step(models)
    if updates == 2:
        with torch.no_grad():
            for n, parameter in enumerate(policy.parameters()):
                parameter += 0.03 * torch.sin(torch.arange(parameter.numel()) + n).view_as(parameter)
        step = source.next_step(models)
    totals, _ = losses(config, policy, step)
    ours = sum(value for term, value in totals.items() if not term.startswith("measured"))
    theirs = obvious_loss(source.rows, config, policy, models)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-9)
    gradients = [torch.autograd.grad(loss, list(policy.parameters())) for loss in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    if name in ("grpo", "dapo"):
        assert 0 < totals["measured clip_frac"] < 1


@pytest.mark.parametrize("moe", [False, True])
def test_the_first_update_has_ratio_1_and_no_distance(moe):
    """In fp64 to 1e-10, with the policy itself as the reference."""
    config = rl_config("rl.temperature=0.7", *MOE * moe)
    policy = make_policy(config, dtype=torch.float64)
    step = rollouts(config, policy).next_step({"model": policy, "reference": policy})
    totals, loss = losses(config, policy, step)
    assert totals["measured ratio"].item() == pytest.approx(1, abs=1e-10)
    assert abs(totals["measured kl"].item()) < 1e-10 and abs(totals["kl"].item()) < 1e-10
    assert loss.checked and not loss.moved


def test_log_probabilities_and_entropy():
    """At labels only, as torch.distributions has them; with a soft cap too."""
    for settings in ((), ("model.final_logit_softcapping=3.0",)):
        policy = make_policy(rl_config(*settings))
        ids = torch.randint(0, 200, (3, 7), generator=torch.Generator().manual_seed(0))
        labels = ids.roll(-1, 1).masked_fill(torch.arange(7) < torch.tensor([[2], [6], [7]]), -100)
        output = policy(ids)
        logprobs, entropy = token_logprobs(policy, output.hidden, labels, 0.7)
        there = torch.distributions.Categorical(logits=output.logits / 0.7)
        for ours, theirs in ((logprobs, there.log_prob(labels.clamp(min=0))), (entropy, there.entropy())):
            torch.testing.assert_close(ours, theirs.where(labels >= 0, 0.0), rtol=1e-5, atol=1e-5)
        assert logprobs.requires_grad and not entropy.requires_grad


# --- saboteurs --------------------------------------------------------------------------------------------


def saboteur(spoil, *settings, **changes):
    """The error of the first update on a rollout that was spoiled."""
    config = rl_config("rl.recipe=dr_grpo", *settings)
    policy = make_policy(config)
    step = rollouts(config, policy).next_step({"model": policy})
    batches = [spoil(dict(batch), policy) for batch in step.micro_batches]
    with pytest.raises(UserError, match="before any update") as caught:
        losses(dataclasses.replace(config, **changes), policy, step._replace(micro_batches=batches))
    return str(caught.value)


def test_another_temperature_is_found():
    config = rl_config("rl.recipe=dr_grpo", "rl.temperature=0.8")
    assert "temperature" in saboteur(lambda batch, policy: batch, rl=config.rl)


def test_dropout_is_found():
    """Old log-probabilities from a pass with dropout: the ratio moves before any update."""

    def spoil(batch, policy):
        for layer in policy.model.layers:
            layer.dropout.p = 0.1
        output = policy(batch["input_ids"], padding_mask=batch["padding_mask"], last_only=True)
        for layer in policy.model.layers:
            layer.dropout.p = 0.0
        old, _ = token_logprobs(policy, output.hidden, batch["labels"], 1.0)
        return batch | {"old_logprobs": old.detach()}

    torch.manual_seed(0)
    assert "dropout" in saboteur(spoil)


def test_a_shift_by_one_token_is_found():
    assert "one token" in saboteur(
        lambda batch, policy: batch | {"old_logprobs": batch["old_logprobs"].roll(1, 1)}
    )


def test_one_wrong_number_is_found_and_named():
    """The third token of an answer, in one row: the message says which and by how much."""

    def spoil(batch, policy):
        lengths = (batch["labels"] != -100).sum(1)
        if lengths.max() > 2:
            row = int(lengths.argmax())
            place = int((batch["labels"][row] != -100).nonzero()[2])
            batch["old_logprobs"][row, place] -= math.log(2)
        return batch

    assert "|ratio - 1| is 1 at token 3 of the answer in row" in saboteur(spoil)


def test_a_not_a_number_is_found():
    assert "nan" in saboteur(lambda batch, policy: batch | {"old_logprobs": batch["old_logprobs"] + math.nan})


def test_a_token_with_other_experts_is_left_out():
    """From it on, its row may deviate; before it, nothing may; and if many tokens differ, the run ends."""
    config = rl_config("rl.recipe=dr_grpo", "rl.prompts=24", *MOE, "balance.bias_rate=0")
    policy = make_policy(config)
    step = rollouts(config, policy).next_step({"model": policy})
    _, loss = losses(config, policy, step)
    assert loss.after_step(1.0)["route_gap"] == 0
    batch = next(batch for batch in step.micro_batches if (batch["labels"] != -100).sum(1).max() > 2)
    row = int((batch["labels"] != -100).sum(1).argmax())
    first, second, third, *_ = (batch["labels"][row] != -100).nonzero()[:, 0].tolist()
    batch["old_logprobs"][row, second] += 0.1
    with pytest.raises(UserError, match="token 2 of the answer"):
        losses(config, policy, step)
    batch["experts"][row, third] += 1  # the second token is written before it
    with pytest.raises(UserError, match="token 2 of the answer"):
        losses(config, policy, step)
    batch["experts"][row, second] += 1
    _, loss = losses(config, policy, step)
    assert 0 < loss.after_step(1.0)["route_gap"] < 0.01
    for each in step.micro_batches:
        each["experts"] += 1
    _, loss = losses(config, policy, step)
    with pytest.raises(UserError, match="100.0% of all tokens chose other experts"):
        loss.after_step(1.0)


def test_codes_tell_choices_apart():
    """Equal sets in any order have equal codes; other sets, and the same in another layer, have others."""
    def code(*layers):
        logits, indices = torch.zeros(1, 16), [torch.tensor([one]) for one in layers]
        return routing_codes([SimpleNamespace(logits=logits, indices=one) for one in indices]).item()

    assert code([1, 2, 3], [4, 5, 6]) == code([3, 1, 2], [6, 5, 4])
    assert len({code([1, 2, 3], [4, 5, 6]), code([4, 5, 6], [1, 2, 3]), code([1, 2, 4], [4, 5, 6])}) == 3


def test_a_reference_that_moves_is_found(tmp_path):
    """A reference that shares a matrix with the policy: training changes both."""
    config = rl_config()
    policy, reference = make_policy(config), make_policy(config)
    run = make_run(tmp_path, config, policy, reference)
    reference.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.data, requires_grad=False)
    with pytest.raises(UserError, match="frozen model reference was changed"):
        run.run()


def test_the_terms_and_what_they_claim():
    """A second head is no part of the policy; the balance of the experts is."""
    config = rl_config(*MOE, "model.mtp=sequential")
    policy = make_policy(config)
    policy.mtp.requires_grad_(False)
    loss = PolicyLoss(policy, config, machine())
    assert loss.claims()["pg"]("lm_head.weight") and not loss.claims()["kl"]("mtp.anything")
    totals, _ = losses(config, policy, rollouts(config, policy).sample())
    assert {"pg", "kl", "balance"} <= totals.keys() and totals["kl"] > 0
