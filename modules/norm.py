"""RMSNorm: divide each vector by its root mean square, then scale every channel by a learned gain.

    y = weight * x / sqrt(mean(x^2) + eps)

Unlike LayerNorm it neither subtracts the mean nor adds a bias. Dividing by the root mean square makes the output's size
independent of the input's: a block reads the same direction whether the residual stream has grown or not.

    x: (..., C)   weight: (C,)   ->   (..., C), dtype of x

Paper: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
Trap: the statistics are taken in fp32. In bf16 (8 bits of mantissa) a sum over C squares loses the small ones.
"""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """`forward(x)` normalises the last dimension of `x` (..., C). Same parameters as `Qwen3RMSNorm`."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """(..., C) -> (..., C), in the dtype of `x`."""
        return FusedRMSNorm.apply(x, self.weight, self.eps)


def rms_norm(x, weight, eps: float):
    """The formula as it stands in the paper; the reference for `FusedRMSNorm`. (..., C) -> (..., C)."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    rstd = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight.to(x.dtype)


class FusedRMSNorm(torch.autograd.Function):
    """The same value with a backward pass derived by hand, which keeps x and one number per row instead of five copies.

    With r = 1 / sqrt(mean(x^2) + eps), n = x * r and the incoming gradient g:

        d weight = sum over rows of g * n
        d x      = r * (w*g - n * mean(n * w*g))     the part of w*g along n changes only the length: no effect
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        """x (..., C), weight (C,) -> (..., C)."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        rstd = rstd.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        """grad (..., C) -> gradients of x, weight, eps."""
        x, weight, rstd = ctx.saved_tensors
        normed = x.to(rstd.dtype) * rstd
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        scaled = grad.to(rstd.dtype) * weight
        along = (scaled * normed).mean(dim=-1, keepdim=True)
        return (scaled - normed * along).mul_(rstd).to(x.dtype), grad_weight, None


def lesson():
    """Two tokens, one a hundred times the other, come out the same size; the learned gain then scales channels."""
    torch.manual_seed(0)
    small = torch.randn(1, 6)
    x = torch.cat([small, 100 * small])
    norm = RMSNorm(6)
    print("RMSNorm: the second row is 100 times the first")
    print("  in :", *[f"rms {row.pow(2).mean().sqrt():7.2f}" for row in x])
    print("  out:", *[f"rms {row.pow(2).mean().sqrt():7.2f}" for row in norm(x)])
    print("  first row :", [round(v, 2) for v in norm(x)[0].tolist()])
    print("  second row:", [round(v, 2) for v in norm(x)[1].tolist()], "(the direction is kept)")
    with torch.no_grad():
        norm.weight[0] = 3.0
    print("  gain 3 on channel 0:", [round(v, 2) for v in norm(x)[0].tolist()])
    many = torch.ones(4096, dtype=torch.bfloat16)
    total = torch.zeros((), dtype=torch.bfloat16)
    for value in many:
        total += value
    print(f"  why fp32: 4096 ones added one by one in bf16 give {total.item():.0f}")


if __name__ == "__main__":
    lesson()
