"""LayerNorm: shift each vector to mean 0, divide it by its standard deviation, then scale and shift channels.

    y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias,     var(x) = mean((x - mean(x))^2)

RMSNorm (modules/norm.py) leaves out the mean and the bias, and loses little. BERT has both; ModernBERT keeps
the mean and drops the bias. Adding the same number to all channels of x changes nothing here.

    x: (..., C)   weight, bias: (C,)   ->   (..., C)

Paper: Ba et al., "Layer Normalization", arXiv 1607.06450. Names as in `torch.nn.LayerNorm`.
Trap: the variance divides by C, not by C - 1, and eps is inside the root. BERT's eps is 1e-12.
Trap: statistics are taken in fp32. The mean of squares minus the square of the mean would save a pass, but
for a large mean it is a small difference of two large numbers.
"""

import torch
from torch import nn

from modules.norm import RMSNorm


class LayerNorm(nn.Module):
    """`forward(x)` normalises the last dimension of x (..., C).

    The output has the dtype of x, under autocast too: in post-norm order it is the residual stream itself.
    """

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x):
        """(..., C) -> (..., C)."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        centred = wide - wide.mean(dim=-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + self.eps)
        out = centred * rstd * self.weight
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def make_norm(config) -> nn.Module:
    """Return the norm that an `EncoderConfig` names: reads norm, hidden_size, norm_eps, norm_bias."""
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)


def lesson():
    """Print what the two norms make of a vector, scaled and shifted, and the error of a single pass."""
    torch.manual_seed(0)
    x = torch.randn(6)
    norms = {"LayerNorm": LayerNorm(6), "RMSNorm": RMSNorm(6)}
    print("a vector, its tenfold, and the vector with 10 added to each channel")
    for name, change in {"x": x, "10 x": 10 * x, "x + 10": x + 10}.items():
        for kind, norm in norms.items():
            print(f"  {kind:9s} of {name:6s}", *[f"{value:6.2f}" for value in norm(change).tolist()])
    print("the variance of 512 numbers around a mean, in fp32: both formulas against fp64")
    for mean in (0.0, 10.0, 1000.0):
        wide = torch.randn(512) + mean
        real = wide.double().var(correction=0)
        two = (wide - wide.mean()).square().mean()
        one = wide.square().mean() - wide.mean().square()
        print(f"  mean {mean:6.0f}: two passes are off by {(two - real).abs() / real:.0e}, "
              f"one pass by {(one - real).abs() / real:.0e}")  # fmt: skip


if __name__ == "__main__":
    lesson()
