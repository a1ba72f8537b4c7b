"""GPTQ against the constrained least squares solution, column by column, and its properties."""

import pytest
import torch

from modules.quantized import gptq as module
from modules.quantized.gptq import add_inputs, gptq
from modules.quantized.integers import dequantize, quantize


def case(seed, out=6, width=24, tokens=200, rank=8):
    """A weight, correlated inputs of different size, and their H in fp64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    x = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    x = x + 0.3 * torch.randn(tokens, width, generator=generator)
    x = x * (1 + 4 * torch.rand(width, generator=generator))
    hessian = torch.zeros(width, width, dtype=torch.float64)
    add_inputs(hessian, x)
    return weight, x, hessian


def error(codes, weight, x):
    """Squared error of the output."""
    return float(((dequantize(*codes) - weight) @ x.T).square().sum())


def free_columns(weight, hessian, fixed, values):
    """The columns that are not fixed, such that (w - w') H (w - w')^T is least while the fixed ones have
    `values`: w2 + H22^-1 H21 (w1 - q1), by a general solver."""
    free = [i for i in range(weight.shape[1]) if i not in fixed]
    lost = (weight[:, fixed] - values[:, fixed]) @ hessian[fixed][:, free]
    return free, weight[:, free] + torch.linalg.solve(hessian[free][:, free], lost.T).T


@pytest.mark.parametrize("batch", [1, 5, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "group, symmetric", [(None, True), (None, False), (4, True), (4, False), (12, False)]
)
def test_each_code_is_that_of_the_least_squares_solution(group, symmetric, act_order, batch, monkeypatch):
    """Whatever the batches. With the columns before fixed at their codes' numbers, the next column of the
    solution in fp64 is rounded; without act order, a group's scale comes from the solution at its start."""
    monkeypatch.setattr(module, "BATCH", batch)
    weight, _, hessian = case(3)
    codes, scales, zeros = gptq(weight, hessian, 4, group, symmetric, act_order)
    values = dequantize(codes, scales, zeros, torch.float64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    diagonal = hessian.diagonal().tolist()
    order = sorted(range(24), key=lambda i: -diagonal[i]) if act_order else list(range(24))
    size, w, low = group or 24, weight.double(), -8 if symmetric else 0
    for step, column in enumerate(order):
        free, solution = free_columns(w, damped, order[:step], values)
        at = column // size
        if column % size == 0 or act_order:
            inside = [free.index(i) for i in range(at * size, at * size + size) if i in free]
            numbers = (w[:, at * size : at * size + size] if act_order else solution[:, inside]).float()
            wanted = quantize(numbers, 4, None, symmetric)
            assert torch.equal(scales[:, at], wanted.scales[:, 0])
            assert symmetric or torch.equal(zeros[:, at], wanted.zeros[:, 0])
        zero = 0 if symmetric else zeros[:, at].double()
        code = ((solution[:, free.index(column)] / scales[:, at].double()).round() + zero).clamp(
            low, low + 15
        )
        assert torch.equal(codes[:, column].double(), code)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group, symmetric", [(None, True), (6, False)])
def test_independent_inputs_give_plain_rounding(group, symmetric, act_order):
    weight, _, _ = case(0)
    sizes = torch.rand(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    plain = quantize(weight, 4, group, symmetric)
    for hessian in (torch.eye(24), torch.diag(sizes), torch.zeros(24, 24)):  # without any input too
        for mine, theirs in zip(gptq(weight, hessian, 4, group, symmetric, act_order), plain, strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)


def errors(weight, x, group):
    """Errors of the output: plain rounding, GPTQ without act order, and with it."""
    hessian = torch.zeros(24, 24)
    add_inputs(hessian, x)
    found = [gptq(weight, hessian, 4, group, act_order=order) for order in (False, True)]
    return [error(codes, weight, x) for codes in (quantize(weight, 4, group), *found)]


@pytest.mark.parametrize("group", [None, 8])
def test_errors_of_outputs(group):
    """Five seeds, no exception. With inputs of rank 8 in 24 and a little noise, most of an error can be made
    up for: less than 0.6 of plain rounding's stays. One in 8 inputs ten times as large: if it comes first,
    all others make up for it, if last, none; so act order is better."""
    for seed in range(5):
        weight, x, _ = case(seed)
        plain, straight, ordered = errors(weight, x, group)
        assert max(straight, ordered) < 0.6 * plain
        _, straight, ordered = errors(weight, x * (1 + 9 * (torch.arange(24) % 8 == 7)), group)
        assert ordered < straight


def test_an_input_that_is_always_zero_is_rounded_plainly():
    """It has no error to make up for and makes up for none."""
    weight, x, _ = case(1)
    x[:, 5] = 0
    hessian = torch.zeros(24, 24)
    add_inputs(hessian, x)
    for act_order in (True, False):
        codes = gptq(weight, hessian, 4, None, True, act_order).codes
        assert torch.equal(codes[:, 5], quantize(weight, 4).codes[:, 5])


def test_fewer_tokens_than_inputs():
    """H has no inverse: damping helps, and without it the error says so. So does a Hessian with NaN."""
    weight, x, _ = case(2, tokens=3)
    hessian = torch.zeros(24, 24)
    add_inputs(hessian, x)
    assert error(gptq(weight, hessian, 4), weight, x) < error(quantize(weight, 4), weight, x)
    for broken, damp in ((hessian.new_ones(24, 24), 0.0), (hessian * torch.nan, 0.01)):
        with pytest.raises(ValueError, match="has no inverse"):
            gptq(weight, broken, 4, damp=damp)


def test_inputs_are_added_up():
    """In parts as at once, equal to the sum over tokens of 2 x x^T, and in the dtype of H."""
    _, x, _ = case(0, tokens=7)
    hessian = torch.zeros(24, 24)
    add_inputs(hessian, x[:3].bfloat16()), add_inputs(hessian, x[3:3]), add_inputs(hessian, x[3:])
    expected = sum(2 * torch.outer(row, row) for row in (*x[:3].bfloat16().float(), *x[3:]))
    assert torch.allclose(hessian, expected, rtol=1e-5, atol=1e-4)


def test_awkward_shapes():
    """One row, one column, a row of zeros, other dtypes, 8 bits, scales in fp16; groups that do not fit."""
    weight, x, hessian = case(0)
    weight[1] = 0
    assert torch.equal(gptq(weight[:1], hessian, 4).codes, gptq(weight, hessian, 4).codes[:1])
    assert not dequantize(*gptq(weight, hessian, 4, 4, symmetric=False))[1].any()
    assert torch.equal(gptq(weight[:, :1], hessian[:1, :1], 4).codes, quantize(weight[:, :1], 4).codes)
    half = gptq(weight.bfloat16(), hessian, 4, 8)
    assert torch.equal(half.codes, gptq(weight.bfloat16().double(), hessian, 4, 8).codes)
    assert error(gptq(weight, hessian, 8), weight, x) < error(quantize(weight, 8), weight, x)
    assert gptq(weight, hessian, 4, 8, scale_dtype=torch.float16).scales.dtype == torch.float16
    with pytest.raises(ValueError, match="groups of 7 do not divide rows of 24"):
        gptq(weight, hessian, 4, 7)
