"""LayerNorm against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from modules.encoder.layer_norm import LayerNorm
from tests.modules.tools import shake


@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 7), (1, 1, 1), (9,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_value_and_gradients_are_those_of_torch(shape, bias, eps):
    """One channel has no variance, so 1/sqrt(eps), up to 1e6, multiplies the rounding of x, 1e-15."""
    bound = 1e-12 if shape[-1] > 1 else 4e-9
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, dtype=torch.float64) * 3 + 5
    upstream, ours = torch.randn_like(x), shake(LayerNorm(shape[-1], eps, bias).double())
    inputs = (x.requires_grad_(), *ours.parameters())
    assert len(inputs) == 2 + bias
    out, expected = ours(x), F.layer_norm(x, shape[-1:], ours.weight, ours.bias, eps)
    torch.testing.assert_close(out, expected, rtol=bound, atol=bound)
    grads = [torch.autograd.grad(one, inputs, upstream) for one in (out, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


def test_bf16_takes_its_statistics_in_fp32():
    """Within one rounding of fp64, a unit of 8 bits; a mean of 40 in bf16 would cost 40 times that."""
    torch.manual_seed(0)
    x, ours = (torch.randn(9, 512) + 40).bfloat16(), shake(LayerNorm(512)).bfloat16()
    exact = F.layer_norm(x.double(), (512,), ours.weight.double(), ours.bias.double())
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x).double(), exact, rtol=2**-8, atol=1e-5)


def test_a_constant_row_gives_the_bias():
    ours = shake(LayerNorm(8, 1e-12))
    assert torch.equal(ours(torch.full((2, 8), 3.0)), ours.bias.expand(2, 8))
