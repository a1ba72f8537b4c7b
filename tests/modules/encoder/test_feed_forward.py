"""The feed-forward against the formula with `erf` from Python's math library."""

import math

import pytest
import torch

from modules.encoder.feed_forward import FeedForward
from tests.modules.tools import shake

FORMULA = {
    "gelu": lambda a: a / 2 * (1 + math.erf(a / math.sqrt(2))),
    "gelu_new": lambda a: a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "silu": lambda a: a / (1 + math.exp(-a)),
}


@pytest.mark.parametrize("act", FORMULA)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_formula(act, gated, bias):
    block = shake(FeedForward(5, 9, act, gated, bias), scale=1.0).double()
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def product(name, x):
        out = x @ block.get_parameter(f"{name}.weight").T
        return out + block.get_parameter(f"{name}.bias") if bias else out

    inner = product("gate_proj" if gated else "up_proj", x).apply_(FORMULA[act])
    inner = inner * product("up_proj", x) if gated else inner
    torch.testing.assert_close(block(x), product("down_proj", inner), rtol=1e-13, atol=1e-13)
    assert len(list(block.parameters())) == (2 + gated) * (1 + bias)
