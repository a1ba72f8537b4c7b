"""Cross-entropy with a bias against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from modules.encoder.mlm_head import biased_cross_entropy


@pytest.mark.parametrize("N", [0, 1, 300])
def test_value_and_gradients(N):
    """No token, one, and more than one chunk."""
    generator = torch.Generator().manual_seed(N)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
              for shape in ((N, 7), (29, 7), (29,))]  # fmt: skip
    labels = torch.randint(0, 29, (N,), generator=generator)
    total, nll = biased_cross_entropy(*inputs, labels)
    logits = inputs[0] @ inputs[1].T + inputs[2]
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(3 * total, inputs), torch.autograd.grad(3 * expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_under_autocast():
    """Products in bf16, the bias among them; softmax and log in fp32."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(40, 32), torch.randn(29, 32) * 0.1, torch.randn(29)
    labels = torch.randint(0, 29, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        _, nll = biased_cross_entropy(hidden, weight, bias, labels)
    exact = F.cross_entropy(hidden @ weight.T + bias, labels, reduction="none")
    torch.testing.assert_close(nll, exact, rtol=0, atol=0.03)  # two logits below 4, each off by 2**-8 of it
