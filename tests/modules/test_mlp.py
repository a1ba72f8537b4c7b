"""SwiGLU against Hugging Face's `Qwen3MLP`, value and gradients."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from modules.mlp import SwiGLU
from tests.modules.tools import shake


@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 1, 12), (12,)])
def test_it_is_qwens(shape):
    ours = shake(SwiGLU(12, 20), seed=4).double()
    theirs = Qwen3MLP(Qwen3Config(hidden_size=12, intermediate_size=20)).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)
    mine = torch.autograd.grad(ours(x), [x, *ours.parameters()], upstream)
    parameters = dict(theirs.named_parameters())
    other = torch.autograd.grad(
        theirs(x), [x, *(parameters[n] for n, _ in ours.named_parameters())], upstream
    )
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
