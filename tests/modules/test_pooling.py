"""Pooling against an obvious loop, with padding on either side, full of NaN, and rows of nothing else."""

import math

import pytest
import torch

from modules.pooling import pool, unit

KINDS = ("mean", "last", "cls", "attention")
QUERY = 2 * torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
MASKS = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def material():
    """Hidden states (6, 4, 5) with NaN at padding, and the mask."""
    hidden = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor(MASKS)
    return hidden.masked_fill(mask[..., None] == 0, torch.nan), mask


def obvious(row, mask, kind):
    """One row at a time, with the real tokens alone."""
    real = [token for token, one in zip(row, mask) if one]
    if not real:
        return torch.zeros_like(row[0])
    shares = [math.exp(token @ QUERY) for token in real]
    attention = sum(share * token for share, token in zip(shares, real)) / sum(shares)
    one = {"mean": sum(real) / len(real), "last": real[-1], "cls": real[0], "attention": attention}[kind]
    return one / one.pow(2).sum().sqrt()


def check(pool, kind):
    """Compare with the obvious loop; no NaN at padding, which would give every mistake away."""
    hidden, mask = material()
    hidden = hidden.nan_to_num(3.0)
    expected = torch.stack([obvious(row, one, kind) for row, one in zip(hidden, mask)])
    torch.testing.assert_close(pool(hidden, mask, kind, QUERY), expected)


def counting_padding(hidden, mask, kind, query):
    everything = pool(hidden, torch.ones_like(mask), "attention", query)
    places = {"mean": hidden.mean(1), "last": hidden[:, -1], "cls": hidden[:, 0], "attention": everything}
    return torch.where(mask.any(1, keepdim=True), unit(places[kind]), 0)


def dividing_by_all(hidden, mask, kind, query):
    return pool(hidden, mask, kind, query) * mask.double().mean(1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saboteur_is_noticed(kind):
    check(pool, kind)
    for mistake in (counting_padding, dividing_by_all):
        with pytest.raises(AssertionError):
            check(mistake, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_equals_the_obvious_loop(kind):
    hidden, mask = material()
    expected = torch.stack([obvious(row, one, kind) for row, one in zip(hidden, mask)])
    torch.testing.assert_close(pool(hidden, mask, kind, QUERY), expected)
    one_token = pool(hidden[:, :1], mask[:, :1], kind, QUERY)
    torch.testing.assert_close(one_token[0], unit(hidden[0, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_no_gradient_and_no_row_a_nan(kind):
    hidden, mask = material()
    hidden = hidden.nan_to_num(3.0).requires_grad_()
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (pool(hidden, mask, kind, QUERY) * weights).sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[mask == 0].any()
    assert hidden.grad[:5].flatten(1).any(1).all()
    rows = hidden.detach()[:5].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(x, mask[:5], kind, QUERY), rows)


def test_the_query_learns_and_zeros_are_the_mean():
    hidden, mask = material()
    torch.testing.assert_close(pool(hidden, mask, "attention", 0 * QUERY), pool(hidden, mask, "mean"))
    hidden, query = hidden.nan_to_num(3.0), QUERY.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(hidden, mask, "attention", x), query)
    for huge in (1e6 * QUERY, -1e6 * QUERY):  # the best token alone, without overflow, never padding
        best = (hidden @ huge).masked_fill(mask == 0, -torch.inf).argmax(1)[:5]
        found = pool(hidden, mask, "attention", huge)[:5]
        torch.testing.assert_close(found, unit(hidden[torch.arange(5), best]))


def test_zeros_stay_zeros_and_pass_on_no_huge_gradient():
    vectors = torch.zeros(2, 3, requires_grad=True)
    unit(vectors).sum().backward()
    assert not unit(vectors).any() and vectors.grad.abs().max() <= 1


def test_half_precision_is_widened():
    hidden, mask = torch.randn(2, 300, 4).bfloat16(), torch.ones(2, 300)
    expected = torch.nn.functional.normalize(hidden.double().mean(1), dim=-1)
    assert pool(hidden, mask, "mean").dtype == torch.float32
    torch.testing.assert_close(pool(hidden, mask, "mean").double(), expected, atol=1e-5, rtol=0)


def test_autocast_leaves_the_scores_of_attention_in_fp32():
    torch.manual_seed(0)
    hidden, query, mask = torch.randn(2, 300, 64), torch.randn(64), torch.ones(2, 300)
    expected = pool(hidden.double(), mask, "attention", query.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(hidden, mask, "attention", query)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)  # in bf16 0.008
