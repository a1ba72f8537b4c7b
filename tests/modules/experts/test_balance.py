"""The balance losses against obvious loops in fp64, Hugging Face's loss, and numbers worked out by hand."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as qwen_loss

from modules.experts.balance import balance_value, expert_sums, max_vio, shares, z_loss
from modules.experts.router import Routing

FORMS = [("switch", "hard"), ("switch", "soft"), ("kl", "hard"), ("kl", "soft")]


def route(logits, K, scoring="softmax"):
    """Logits (N, E) -> Routing, as a router would."""
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    weights, indices = scores.topk(K, dim=-1)
    return Routing(logits, scores, indices, weights)


def whole_loss(routing, mask, form, measure):
    """The loss over all real tokens of a batch, from the functions under test."""
    counts, probs = expert_sums(routing, mask)
    return balance_value(*shares(counts.sum(0), probs.sum(0), routing.indices.shape[1]), form, measure)


def slow_shares(logits, indices, real, scoring):
    """f and P as lists of numbers, one token and one expert at a time; P from the logits, by hand."""
    E = logits.shape[1]
    f, P, tokens = [0.0] * E, [0.0] * E, 0
    for n in range(len(logits)):
        if not real[n]:
            continue
        tokens += 1
        s = [math.exp(a) if scoring == "softmax" else 1 / (1 + math.exp(-a)) for a in logits[n].tolist()]
        for i in range(E):
            P[i] += s[i] / sum(s)
            f[i] += indices[n].tolist().count(i)
    return [a / (tokens * indices.shape[1]) for a in f], [a / tokens for a in P]


def slow_value(f, P, form, measure):
    """The table of forms, written out."""
    E = len(P)
    if form == "switch":
        return E * sum(a * b for a, b in zip(f if measure == "hard" else P, P, strict=True))
    q = f if measure == "hard" else P
    return sum(a * math.log(a * E) for a in q if a > 0)


def slope(f, P, form, measure):
    """dL/dP_i by hand; f counts as P in the straight-through estimate, where 0 counts as 1e-6."""
    E = len(P)
    if form == "switch":
        return [E * a for a in f] if measure == "hard" else [2 * E * a for a in P]
    return [math.log(E * a) + 1 if a else math.log(E * 1e-6) for a in (f if measure == "hard" else P)]


@pytest.mark.parametrize("form, measure", FORMS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows, tokens, E, K", [(2, 7, 5, 2), (1, 1, 3, 1), (3, 4, 6, 6), (1, 5, 1, 1)])
def test_value_and_gradient_are_those_of_the_loop(form, measure, scoring, rows, tokens, E, K):
    torch.manual_seed(E)
    x = torch.randn(rows * tokens, 4, dtype=torch.float64)
    weight = torch.randn(E, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(rows, tokens) < 0.7
    mask[0, 0] = True
    real = mask.flatten().tolist()
    routing = route(x @ weight.T, K, scoring)
    loss = whole_loss(routing, mask, form, measure)
    f, P = slow_shares(routing.logits, routing.indices, real, scoring)
    assert abs(loss.item() - slow_value(f, P, form, measure)) < 1e-13
    (ours,) = torch.autograd.grad(loss, weight)
    g, step = slope(f, P, form, measure), 1e-6
    for e in range(E):
        for c in range(4):
            moved = []
            for sign in (1, -1):  # sum_i g_i P_i(W) with g fixed, by finite differences
                w = weight.detach().clone()
                w[e, c] += sign * step
                P_moved = slow_shares(x @ w.T, routing.indices, real, scoring)[1]
                moved.append(sum(a * b for a, b in zip(g, P_moved, strict=True)))
            assert abs(ours[e, c].item() - (moved[0] - moved[1]) / (2 * step)) < 1e-8
    assert (measure == "hard" and K == E) or E == 1 or ours.abs().max() > 1e-4


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("oracle", [qwen_loss, mixtral_loss])
def test_switch_hard_times_k_is_hugging_faces_loss_of_one_layer(oracle, padded, K):
    torch.manual_seed(K)
    logits = torch.randn(3 * 8, 5, requires_grad=True)
    mask = torch.ones(3, 8, dtype=torch.bool)
    if padded:
        mask[0, 3:] = mask[1, :2] = False
    theirs = oracle((logits,), 5, K, mask.long() if padded else None)
    ours = K * whole_loss(route(logits, K), mask, "switch", "hard")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (a,), (b,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form, measure", FORMS)
def test_even_routing_costs_one_and_kl_nothing_for_every_k(form, measure):
    E = 6
    for K in range(1, E + 1):
        indices = torch.stack([(torch.arange(K) + n) % E for n in range(2 * E)])
        for score in (1 / E, 0.3):  # softmax, and sigmoids that do not add up to 1
            scores = torch.full((2 * E, E), score, dtype=torch.float64)
            value = whole_loss(Routing(scores, scores, indices, None), torch.ones(2, E), form, measure)
            assert abs(value.item() - (form == "switch")) < 1e-12


@pytest.mark.parametrize("form, measure", FORMS)
def test_all_tokens_on_one_expert_cost_the_most(form, measure):
    E = 8
    scores = torch.zeros(9, E, dtype=torch.float64)
    scores[:, 3] = 1
    routing = Routing(scores, scores, scores.argmax(1)[:, None], None)
    value = whole_loss(routing, torch.ones(1, 9), form, measure)
    assert abs(value.item() - (E if form == "switch" else math.log(E))) < 1e-12


def test_counts_carry_no_gradient_and_the_straight_through_estimate_is_one():
    """d/dP of KL(f) is that of KL with f in the place of P: ln(E f) + 1, bounded where f is 0."""
    f = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    counts, _ = expert_sums(route(torch.randn(6, 4, requires_grad=True), 2), torch.ones(2, 3))
    assert not counts.requires_grad
    value = balance_value(f, P, "kl", "hard")
    assert value.item() == sum(a * math.log(4 * a) for a in (0.5, 0.3, 0.2))
    (gradient,) = torch.autograd.grad(value, P)
    expected = [math.log(4 * a) + 1 for a in (0.5, 0.3, 0.2)] + [math.log(4 * 1e-6)]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    # a count as it is, treated as a constant, would give the loss no graph at all
    assert not (f * f.clamp(min=1e-6).log()).sum().requires_grad


@pytest.mark.parametrize("form, measure", FORMS)
def test_probabilities_of_zero_give_finite_values_and_gradients(form, measure):
    """Softmax that underflows, sigmoids that are all zero, and rows of padding only."""
    for scoring in ("softmax", "sigmoid"):
        logits = torch.tensor([[200.0, -200, -200], [-200, -200, -200], [1, 2, 3]], requires_grad=True)
        for mask in (torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]])):
            value = whole_loss(route(logits, 1, scoring), mask, form, measure)
            (gradient,) = torch.autograd.grad(value, logits)
            assert value.isfinite() and gradient.isfinite().all()
            assert mask.any() or not gradient.any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form, measure", FORMS)
def test_padding_changes_nothing(form, measure, scoring):
    torch.manual_seed(3)
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    wild = torch.randn(2, 3, 4, dtype=torch.float64) * 1e4
    results = []
    for padding in (wild[:, :0], wild, -wild):
        x = torch.cat((logits, padding), dim=1).requires_grad_()
        mask = torch.arange(x.shape[1]).expand(2, -1) < 5
        value = whole_loss(route(x.flatten(0, 1), 2, scoring), mask, form, measure)
        value = value + z_loss(x.flatten(0, 1), mask)
        (gradient,) = torch.autograd.grad(value, x)
        assert not gradient[:, 5:].any()
        results.append((value.detach(), gradient[:, :5]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-14, atol=0)


def test_z_loss_and_its_gradient_are_those_of_the_paper():
    torch.manual_seed(0)
    logits = (torch.randn(6, 5, dtype=torch.float64) * 4).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    value, expected = z_loss(logits, mask), torch.zeros_like(logits)
    total = 0.0
    for n in (0, 1, 4, 5):
        lse = math.log(sum(math.exp(a) for a in logits[n].tolist()))
        total += lse**2
        expected[n] = 2 * lse * logits[n].softmax(-1)
    assert abs(value.item() - total) < 1e-11
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], expected, rtol=1e-12, atol=1e-12)


def test_max_vio_of_known_loads():
    """Even 0, all tokens on the same 2 of 8 experts E/K - 1 = 3, nothing counted 0; integers too."""
    assert max_vio(torch.full((7,), 3)) == 0 and max_vio(torch.zeros(4)) == 0
    assert max_vio(torch.tensor([0, 50, 0, 0, 50, 0, 0, 0])) == 3
    assert abs(max_vio(torch.tensor([1.0, 2.0, 6.0])) - 1) < 1e-15


def test_the_hard_forms_see_what_the_soft_ones_do_not():
    """0.51 against 0.49 for every token: P is nearly even, and every token goes to the first expert."""
    logits = torch.tensor([0.51, 0.49]).log().expand(10, 2)
    values = {form: whole_loss(route(logits, 1), torch.ones(1, 10), *form).item() for form in FORMS}
    assert abs(values["switch", "soft"] - 1) < 1e-3 and abs(values["kl", "soft"]) < 1e-3
    assert abs(values["kl", "hard"] - math.log(2)) < 1e-6
