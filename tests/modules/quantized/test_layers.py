"""Layers on codes against layers on the matrices that the codes stand for, and W8A8 against integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.experts.moe import Experts
from modules.quantized import integers
from modules.quantized.layers import QuantExperts, QuantLinear, rounded
from modules.quantized.stored import StoredIntegers, StoredNF4

STORES = {
    "int8": lambda shape: StoredIntegers(shape, 8),
    "int4": lambda shape: StoredIntegers(shape, 4, 4),
    "int4, zeros": lambda shape: StoredIntegers(shape, 4, 4, symmetric=False),
    "NF4": lambda shape: StoredNF4(shape, double_quant=True),
}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantized(make, scaled=False, bias=True, activations=False):
    layer = QuantLinear(make((6, 12)), normal(6, seed=2) if bias else None, scaled, activations)
    layer.store.round(normal(6, 12, seed=1))
    if scaled:
        layer.input_scale = normal(12, seed=3).exp()
    return layer


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_linear_and_its_gradient(make, scaled):
    """Equal to F.linear in fp64 with the dequantised matrix, whose columns bear the scale of the input."""
    layer, x = quantized(make, scaled), normal(2, 5, 12, dtype=torch.float64).requires_grad_()
    scale = layer.input_scale.double() if scaled else 1
    matrix = layer.store.dequantize().double() * scale
    expected = F.linear(x, matrix, layer.bias.double())
    slope = normal(2, 5, 6, seed=4, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, x, slope)
    found = layer(x)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
    assert torch.allclose(torch.autograd.grad(found, x, slope)[0], wanted, rtol=1e-13, atol=1e-13)
    assert torch.allclose(layer.weight.double(), matrix, rtol=1e-6)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_nothing_is_kept_for_the_backward_pass():
    layer, kept = quantized(STORES["int4"], bias=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        layer(normal(3, 12).requires_grad_()).sum().backward()
    assert not kept


def test_autocast():
    """As nn.Linear on the dequantised matrix: products in bf16."""
    layer = quantized(STORES["int4"])
    plain = nn.Linear(12, 6)
    plain.weight.data, plain.bias.data = layer.weight, layer.bias.data
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = layer(normal(5, 12)), plain(normal(5, 12))
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert torch.allclose(mine.float(), theirs.float(), rtol=2**-7, atol=2**-7)  # the bias is added apart


def test_rounded_inputs_are_products_of_integers():
    """W8A8: each output is an integer sum times the scales of its token and its row. Awkward: a token of
    zeros, an outlier, a row of zeros."""
    layer, x = quantized(STORES["int8"], bias=False, activations=True), normal(4, 12)
    weight = normal(6, 12, seed=1)
    x[1], x[2, 3], weight[4] = 0, 500.0, 0
    found = layer.store.round(weight) and layer(x)
    for t in range(4):
        step = float(x[t].abs().max()) / 127.5
        token = [min(max(round(float(number) / step), -128), 127) if step else 0 for number in x[t]]
        for row in range(6):
            codes = [int(code) for code in layer.store.codes[row]]
            total = sum(a * b for a, b in zip(token, codes, strict=True))
            exact = total * step * float(layer.store.scales[row])
            bound = 12 * 2**-23 * sum(map(abs, token)) * 128 * step * float(layer.store.scales[row])
            assert abs(float(found[t, row]) - exact) <= bound
    assert not found[1].any() and not found[:, 4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_input_is_rounded_as_a_row_of_weights_is(dtype):
    """Bit for bit. Awkward: one number, a token of zeros, an outlier, middles between two codes."""
    for shape in ((1, 1), (1, 7), (2, 3, 33)):
        x = normal(*shape, dtype=dtype)
        x[0, 0], x[..., -1, 0] = 0, 300
        x[..., -1, 1:] = torch.arange(shape[-1] - 1) * 300 / 255
        expected = integers.dequantize(*integers.quantize(x.float(), 8)).to(dtype)
        assert torch.equal(rounded(x), expected)


def test_gradient_goes_straight_through_rounded_inputs():
    layer, x = quantized(STORES["int8"], activations=True), normal(3, 12).requires_grad_()
    slope = normal(3, 6, seed=4)
    (found,) = torch.autograd.grad(layer(x), x, slope)
    assert torch.allclose(found, slope @ layer.weight, rtol=1e-6)
    assert (rounded(x.detach()) - x).abs().max() > 0


@pytest.mark.parametrize("implementation", ["loop", "grouped"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_experts(make, scaled, implementation):
    """Equal to `Experts` on the dequantised stacks, with the gradient of x; expert 3 of 4 gets no token."""
    layer = QuantExperts(make((4, 16, 12)), make((4, 12, 8)), implementation, scaled)
    layer.gate_up.round(normal(4, 16, 12)), layer.down.round(normal(4, 12, 8, seed=1))
    if scaled:
        layer.input_scale, layer.inner_scale = normal(12, seed=2).exp(), normal(8, seed=3).exp()
    plain = Experts(4, 12, 8, implementation)
    scales = (layer.input_scale, layer.inner_scale) if scaled else (1, 1)
    plain.gate_up_proj.data = layer.gate_up.dequantize() * scales[0]
    plain.down_proj.data = layer.down.dequantize() * scales[1]
    x, indices = normal(9, 12, seed=4).requires_grad_(), torch.tensor([[0, 1], [2, 0], [1, 2]] * 3)
    weights, slope = normal(9, 2, seed=5).softmax(dim=-1), normal(9, 12, seed=6)
    pairs = []
    for experts in (layer, plain):
        y = experts(x, indices, weights)
        pairs.append((y, *torch.autograd.grad(y, x, slope)))
    for mine, theirs in zip(*pairs, strict=True):
        assert torch.equal(mine, theirs)
