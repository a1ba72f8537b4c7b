"""RMSNorm: divide each vector by its root mean square, then scale every channel by a trained gain.

    y = weight * x / sqrt(mean(x^2) + eps)

Unlike LayerNorm it neither subtracts the mean nor adds a bias. Dividing by the root mean square makes the
size of the output independent of the input's: a block reads the same direction however large the residual
stream has grown.

    x: (..., C)   weight: (C,)   ->   (..., C)

Paper: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
Trap: statistics are taken in fp32. In bf16 (8 bits of mantissa) a long sum of squares loses small terms.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def rms_norm(x, weight, eps: float):
    """The formula of the paper, the reference for `FusedRMSNorm`. (..., C) -> (..., C)."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    rstd = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight.to(x.dtype)


class RMSNorm(nn.Module):
    """`forward(x)` normalises the last dimension of `x` (..., C). Same parameters as `Qwen3RMSNorm`."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """(..., C) -> (..., C), in the dtype of `x`, or of autocast, since a matrix product comes next."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return FusedRMSNorm.apply(x, self.weight, self.eps, dtype)


class FusedRMSNorm(torch.autograd.Function):
    """The same value with a backward pass derived by hand: a third of autograd's time on a CPU.

    With n = x / sqrt(mean(x^2) + eps), r = n / x, y = w * n and the incoming gradient g:

        d w = sum over rows of g * n
        d x = r * (w * g - n * mean(w * g * n))

    The second term removes the part of w * g along x: it would change only the length, which has no effect.

    Trap: do not write the sums as matrix products. Under torch.compile the backward pass would run them in
    the dtype of autocast, and on GPUs fp32 products may run in TF32.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        """x (..., C), weight (C,) -> (..., C) in `dtype`."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        rstd = rstd.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """grad (..., C) -> gradients of x and weight."""
        x, weight, rstd = ctx.saved_tensors
        wide, grad = x.to(rstd.dtype), grad.to(rstd.dtype) * rstd  # r * g
        both = grad * wide  # g * n
        grad_weight = both.reshape(-1, x.shape[-1]).sum(dim=0)
        along = both.mul_(weight).mean(dim=-1, keepdim=True).mul_(rstd).mul_(rstd)
        grad_x = grad.mul_(weight).addcmul_(wide, along, value=-1)  # n * r = x * r^2
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def lesson():
    """Show that a token and its hundredfold come out the same size, and why statistics need fp32."""
    torch.manual_seed(0)
    small, norm = torch.randn(1, 6), RMSNorm(6)
    print("RMSNorm of a token and of 100 times that token")
    for x in (small, 100 * small):
        size, values = x.square().mean().sqrt(), [round(value, 2) for value in norm(x)[0].tolist()]
        print(f"  root mean square {size:6.2f}  ->  {values}")
    total = torch.zeros((), dtype=torch.bfloat16)
    for value in torch.ones(4096, dtype=torch.bfloat16):
        total += value
    print(f"  why fp32: 4096 ones added one by one in bf16 give {total.item():.0f}")


if __name__ == "__main__":
    lesson()
