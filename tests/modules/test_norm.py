"""RMSNorm against PyTorch's own `F.rms_norm`, Hugging Face's `Qwen3RMSNorm`, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from modules.norm import RMSNorm, rms_norm

SHAPES = [(3, 5, 16), (2, 7), (1, 1, 1), (9,), (2, 3, 4, 6)]


def pair(shape, dtype):
    torch.manual_seed(sum(shape))
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 0.5).to(dtype)
    weight = torch.randn(shape[-1], dtype=torch.float64).to(dtype)
    return x, weight


def grads(function, x, weight, upstream):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    function(x, weight).backward(upstream)
    return x.grad, weight.grad


def fused(eps):
    def call(x, weight):
        norm = RMSNorm(x.shape[-1], eps).to(weight.dtype)
        del norm.weight
        norm.weight = weight  # the caller's tensor, so that its gradient can be read
        return norm(x)

    return call


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_value_and_gradient_are_those_of_torch(shape, dtype, tolerance):
    x, weight = pair(shape, dtype)
    upstream = torch.randn(shape, dtype=dtype)
    eps = 1e-3  # large enough to be noticed if it were misplaced

    def theirs(x, weight):
        return F.rms_norm(x, (shape[-1],), weight, eps)

    for ours in (fused(eps), lambda x, w: rms_norm(x, w, eps)):
        torch.testing.assert_close(ours(x, weight), theirs(x, weight), rtol=tolerance, atol=tolerance)
        for a, b in zip(grads(ours, x, weight, upstream), grads(theirs, x, weight, upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_bf16_against_torch_and_qwen():
    """In bf16 the plain form is Qwen3's to the bit; the fused one multiplies before it rounds, as F.rms_norm
    does: the two conventions differ by one unit in the last place."""
    x, weight = pair((4, 33, 64), torch.bfloat16)
    qwen = Qwen3RMSNorm(64, 1e-6).to(torch.bfloat16)
    qwen.weight.data.copy_(weight)
    assert torch.equal(rms_norm(x, weight, 1e-6), qwen(x))
    exact = F.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    ours = fused(1e-6)(x, weight)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)  # half a unit: rounded once
    upstream = torch.randn_like(x)
    real = grads(lambda x, w: F.rms_norm(x, (64,), w, 1e-6), x.double(), weight.double(), upstream.double())
    for a, b in zip(grads(fused(1e-6), x, weight, upstream), real, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2e-2)


def test_under_autocast_the_answer_is_the_rounded_exact_one():
    x, weight = pair((3, 5, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused(1e-6)(x, weight)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), F.rms_norm(x, (16,), weight, 1e-6), rtol=2**-8, atol=1e-6)
    upstream = torch.randn(3, 5, 16).bfloat16()

    def call(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return fused(1e-6)(x, weight)

    real = grads(lambda x, w: F.rms_norm(x, (16,), w, 1e-6), x, weight, upstream.float())
    for a, b in zip(grads(call, x, weight, upstream), real, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_fp32_is_qwens():
    x, weight = pair((2, 9, 32), torch.float32)
    qwen = Qwen3RMSNorm(32, 1e-5)
    qwen.weight.data.copy_(weight)
    torch.testing.assert_close(fused(1e-5)(x, weight), qwen(x), rtol=1e-6, atol=1e-6)


def test_gradients_by_finite_differences():
    x, weight = pair((2, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(fused(1e-2), (x.requires_grad_(), weight.requires_grad_()))


def test_a_strided_input_and_a_zero_row():
    """A transposed view, as QK-norm may get, and a row of zeros, where only eps stands between us and 0/0."""
    x, weight = pair((2, 6, 4, 8), torch.float64)
    view = x.transpose(1, 2)
    view[0, 0, 0] = 0
    upstream = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    real = grads(lambda x, w: F.rms_norm(x, (8,), w, 1e-6), view, weight, upstream)
    for a, b in zip(grads(fused(1e-6), view, weight, upstream), real, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weight = pair((2, 5), torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fused(1e-6)(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.slow
def test_compiled_under_autocast_the_gradient_is_as_exact():
    """AOTAutograd traces the backward pass under the forward's autocast, where matrix products run in bf16.
    Sums of 512 rows in fp32 stay within 1e-5 of fp64; products in bf16 were off by 3e-3."""
    x, weight = pair((512, 64), torch.float32)
    upstream, norm = torch.randn(512, 64).bfloat16(), RMSNorm(64)
    norm.weight.data.copy_(weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(norm, backend="aot_eager", fullgraph=True)(x.requires_grad_())
    ours = torch.autograd.grad(out, (x, norm.weight), upstream)
    wide = (tensor.detach().double() for tensor in (x, weight, upstream))
    real = grads(lambda x, w: F.rms_norm(x, (64,), w, 1e-6), *wide)
    for a, b in zip(ours, real, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_no_matrix_product_could_run_in_tf32():
    """On GPUs fp32 products may keep 10 bits: the sums of the backward pass must be none."""
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = pair((8, 16), torch.float32)
    with FlopCounterMode(display=False) as counter:  # it counts matrix products
        grads(fused(1e-6), x, weight, torch.ones(8, 16))
    assert counter.get_total_flops() == 0
