"""Rounding to integers against torchao, bit for bit, and against the definition."""

import math

import pytest
import torch

from modules.quantized.integers import TINY, dequantize, quantize

SHAPES = {"one number": (1, 1), "one row": (1, 12), "one group a row": (7, 4), "wide": (5, 132)}


def awkward(out, width, seed=0):
    """Random weights, and as far as there are rows: zeros, a constant, a negative one, an outlier, tiny."""
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    for row, special in enumerate((0.0, 0.7, -3.0)):
        if row + 1 < out:
            weight[row + 1] = special
    if out > 4:
        weight[4, 0] = 1e4
        weight[-1] *= 1e-4
    return weight


def torchao_weight(weight, config):
    """The quantised weight of a linear layer, as torchao makes it: with qdata, scale and zero_point."""
    quantization = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    quantization.quantize_(layer, config(quantization))
    return layer.weight


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_eight_bits_are_those_of_torchao(shape):
    weight = awkward(*shape)
    theirs = torchao_weight(weight, lambda q: q.Int8WeightOnlyConfig())
    codes, scales, zeros = quantize(weight, 8)
    assert torch.equal(codes, theirs.qdata) and torch.equal(scales, theirs.scale) and zeros is None
    assert torch.equal(dequantize(codes, scales), theirs.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", [(4, 4), (4, 36), (4, 12), (8, 4), (2, 6)])
def test_groups_are_those_of_torchao(bits, group, symmetric):
    """Codes, scales, zeros and numbers. torchao's scales may be as small as fp32 allows, ours are `TINY` or
    more: groups of zeros have other scales, and the same numbers."""
    weight = awkward(9, 36)
    width, bounds = getattr(torch, f"int{bits}"), "SYMMETRIC" if symmetric else "ASYMMETRIC"

    def config(q):
        mapping = q.MappingType[bounds]
        return q.IntxWeightOnlyConfig(weight_dtype=width, granularity=q.PerGroup(group), mapping_type=mapping)

    theirs = torchao_weight(weight, config)
    codes, scales, zeros = quantize(weight, bits, group, symmetric)
    shift = 0 if symmetric else 2 ** (bits - 1)  # torchao's codes begin at -2^(b-1)
    assert torch.equal(codes.int() - shift, theirs.qdata.int())
    assert torch.equal(scales, theirs.scale.clamp(min=TINY)) and (scales == TINY).any()
    assert symmetric or torch.equal(zeros.int() - shift, theirs.zero_point.int())
    assert torch.equal(dequantize(codes, scales, zeros), theirs.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_by_the_definition_in_fp64(bits, symmetric):
    """Each code by hand, one number after the other, in fp64: no ties among random numbers."""
    weight = torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    codes, scales, zeros = quantize(weight, bits, 3, symmetric, scale_dtype=torch.float64)
    for e, row, group in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2)).tolist():
        numbers = weight[e, row, 3 * group : 3 * group + 3].tolist()
        low, zero, step = -(2 ** (bits - 1)), 0, max(map(abs, numbers)) / (2**bits - 1) * 2
        if not symmetric:
            smallest, largest = min(*numbers, 0), max(*numbers, 0)
            low, step = 0, (largest - smallest) / (2**bits - 1)
            zero = -round(smallest / step)
            assert zeros[e, row, group] == zero
        assert math.isclose(scales[e, row, group], step, rel_tol=1e-15)
        for i, number in enumerate(numbers):
            code = min(max(round(number / step) + zero, low), low + 2**bits - 1)
            assert codes[e, row, 3 * group + i] == code


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_constants(symmetric):
    """A group of zeros stays zeros, in any dtype of scales. Asymmetric: a constant group is hit to the last
    bits, since it and 0 are both ends of the range; and 0 itself is always hit."""
    weight = torch.tensor([[0.0] * 4, [0.3] * 4, [-5.0] * 4, [0.0, 2.0, 3.0, 5.0]])
    for scale_dtype in (torch.float32, torch.float16):
        found = dequantize(*quantize(weight, 4, 2, symmetric, scale_dtype))
        assert found.isfinite().all() and (found[weight == 0] == 0).all()
        bound = 2**-22 if scale_dtype == torch.float32 else 2**-10  # scales are rounded
        assert symmetric or torch.allclose(found[:3], weight[:3], rtol=bound, atol=0)


@pytest.mark.parametrize("group", [None, 4])
def test_no_number_is_off_by_more_than_half_a_step(group):
    """Or by as much as an fp16 scale can be off at the largest code (2^-11 of 7.5 steps). In the asymmetric
    form the zero is rounded too, so the ends of the range may be cut by another half."""
    weight = awkward(9, 36)
    for symmetric, bits in ((True, 4), (False, 4), (True, 8), (False, 8)):
        codes, scales, zeros = quantize(weight, bits, group, symmetric, torch.float16)
        error = (dequantize(codes, scales, zeros) - weight).unflatten(-1, (scales.shape[-1], -1)).abs()
        most = (0.5 if symmetric else 1.0) + 2**bits * 2**-11
        assert (error <= most * scales.float()[..., None]).all()


def test_half_precision_is_rounded_in_fp32():
    """bf16 has 8 bits: a product w / s near 127 would be off by up to half a code. fp32 is off by 2^-17."""
    weight = awkward(6, 40).bfloat16()
    for mine, theirs in zip(quantize(weight, 8), quantize(weight.float(), 8), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    codes, scales, _ = quantize(weight, 8)
    exact = (weight.double() / scales.double()).clamp(-128, 127)
    assert ((codes - exact).abs() <= 0.5 + 2**-16).all()


def test_a_group_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="groups of 5 do not divide rows of 12"):
        quantize(torch.randn(2, 12), 4, 5)
