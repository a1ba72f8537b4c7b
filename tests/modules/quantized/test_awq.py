"""AWQ's scales against torchao's, for one matrix and for stacks."""

import pytest
import torch

from modules.quantized.awq import awq_scales
from modules.quantized.integers import dequantize, quantize


def case(seed, out=24, width=32, tokens=50):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    large = torch.randn(width, generator=generator).mul(1.5).exp()
    return weight, torch.randn(tokens, width, generator=generator) * large


def rounding(group, symmetric):
    return lambda weight: dequantize(*quantize(weight, 4, group, symmetric))


@pytest.mark.parametrize("out, width, tokens", [(24, 32, 50), (1, 8, 3), (5, 72, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_scales_are_those_of_torchao(symmetric, out, width, tokens):
    core, quantization = (
        pytest.importorskip("torchao.prototype.awq.core"),
        pytest.importorskip("torchao.quantization"),
    )
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(8),
        mapping_type=quantization.MappingType["SYMMETRIC" if symmetric else "ASYMMETRIC"],
    )  # fmt: skip
    chosen = set()
    for seed in range(4):
        weight, inputs = case(seed, out, width, tokens)
        inputs[:, 2] = 0  # an input that is never there
        observer = core.AWQObserver(weight, None, config)
        observer(inputs, None)
        theirs = observer.calculate_qparams()
        mine = awq_scales(weight, [inputs], rounding(8, symmetric))
        assert torch.equal(mine, theirs)
        chosen.add(float(mine.max() / mine.min()))
    assert len(chosen) > 1  # not one alpha for all


def test_a_stack_of_equal_experts_is_one_matrix():
    """With the tokens shared out among them, unevenly: the same means, the same sum of errors."""
    weight, inputs = case(0)
    parts = inputs.split([30, 0, 20])
    stack = awq_scales(weight.expand(3, -1, -1), list(parts), rounding(8, True))
    assert torch.allclose(stack, awq_scales(weight, [inputs], rounding(8, True)), rtol=1e-6)


def test_no_input_and_no_gain():
    """Without inputs, and where rounding is exact, nothing is scaled."""
    weight, inputs = case(0)
    assert torch.equal(awq_scales(weight, [inputs[:0]], rounding(8, True)), torch.ones(32))
    assert torch.equal(awq_scales(weight, [inputs], lambda scaled: scaled + 0), torch.ones(32))
    stack = weight.expand(2, -1, -1)
    assert torch.equal(awq_scales(stack, [inputs[:0]] * 2, rounding(8, True)), torch.ones(32))


def test_the_error_of_the_output_falls():
    """It cannot rise, since alpha = 0 is on the grid; with large inputs it falls."""
    for seed in range(4):
        weight, inputs = case(seed)
        scales = awq_scales(weight, [inputs], rounding(8, True))
        plain, scaled = (
            ((rounding(8, True)(weight * s) / s - weight) @ inputs.T).square().sum() for s in (1, scales)
        )
        assert scaled < 0.9 * plain
