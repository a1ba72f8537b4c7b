"""Round a matrix to integers: each group of numbers in a row gets a scale, and maybe a zero point.

    symmetric     s = max|w| / half                     q = round(w / s)          half = (2^b - 1) / 2
    asymmetric    s = (max w - min w) / (2^b - 1)       q = round(w / s) + z      z = low - round(min w / s)

    w' = s (q - z)        low <= q <= low + 2^b - 1       low = -2^(b-1), or 0 if asymmetric

    weight (.., out, in)  ->  codes q (.., out, in), scales s and zeros z (.., out, groups)

A group of g numbers costs b + 16/g bits per number with scales in fp16, and 8/g more for zeros: the smaller
the group, the closer its scale fits. Without a group size a whole row is one. In the asymmetric form 0 lies
within the range, so that it is a code of its own.

Where to clip: with max|w| / half, the largest number may be cut by half a step, and all codes are used. The
conventions are those of torchao (`Int8WeightOnlyConfig`, `IntxWeightOnlyConfig`); but weights in bf16 or fp16
are rounded as fp32, where torchao finds the scale in bf16, and `IntxWeightOnlyConfig` lets scales be smaller.
Papers: Jacob et al., arXiv 1712.05877; groups: Yao et al., arXiv 2206.01861.

Trap: a group of zeros has the scale 0, and 0 / 0 is NaN. Scales are therefore at least `TINY`; in fp16 6e-5.
Trap: w * (1 / s), as torchao computes it, is not always w / s: the last bit decides at the middle between
two codes.
"""

from typing import NamedTuple

import torch

TINY = torch.finfo(torch.float32).eps


class Codes(NamedTuple):
    """A rounded matrix: w' = scales * (codes - zeros), group by group."""

    codes: torch.Tensor  # (.., out, in), int8 if symmetric, else uint8
    scales: torch.Tensor  # (.., out, groups)
    zeros: torch.Tensor | None  # (.., out, groups) uint8; None if symmetric


def grouped(weight, group_size: int | None):
    """(.., out, in) -> (.., out, groups, g). Raise `ValueError` if groups do not divide the row."""
    width = group_size or weight.shape[-1]
    if weight.shape[-1] % width:
        raise ValueError(f"groups of {width} do not divide rows of {weight.shape[-1]}")
    return weight.unflatten(-1, (-1, width))


def scales_and_zeros(groups, bits: int, symmetric: bool, scale_dtype=torch.float32):
    """groups (.., g) -> scales (..) in `scale_dtype`, and zeros (..) uint8 or None.

    `scale_dtype`: the one in which scales are stored. Codes are computed from the rounded scale.
    """
    steps, floor = 2**bits - 1, max(TINY, torch.finfo(scale_dtype).tiny)
    if symmetric:
        scales = groups.abs().amax(dim=-1) / (steps / 2)
        return scales.clamp(min=floor).to(scale_dtype), None
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    scales = ((high - low) / steps).clamp(min=floor).to(scale_dtype)
    zeros = -(low / scales.to(groups.dtype)).round()
    return scales, zeros.clamp(0, steps).to(torch.uint8)


def codes_of(groups, scales, zeros, bits: int):
    """groups (.., g), scales and zeros (..) -> codes (.., g): the nearest ones within the range."""
    low = 0 if zeros is not None else -(2 ** (bits - 1))
    codes = (groups * (1.0 / scales.to(groups.dtype))[..., None]).round()
    codes = codes if zeros is None else codes + zeros[..., None]
    return codes.clamp(low, low + 2**bits - 1).to(torch.int8 if zeros is None else torch.uint8)


def quantize(weight, bits: int, group_size: int | None = None, symmetric=True, scale_dtype=torch.float32):
    """Round weight (.., out, in) to the nearest codes; return `Codes`."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # bf16 cannot hold w / s to a code
    groups = grouped(weight, group_size)  # (.., out, groups, g)
    scales, zeros = scales_and_zeros(groups, bits, symmetric, scale_dtype)
    return Codes(codes_of(groups, scales, zeros, bits).flatten(-2), scales, zeros)


def dequantize(codes, scales, zeros=None, dtype=torch.float32):
    """codes (.., out, in), scales and zeros (.., out, groups) -> (.., out, in)."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).to(dtype)  # (.., out, groups, g)
    groups = groups if zeros is None else groups - zeros[..., None].to(dtype)
    return (groups * scales[..., None].to(dtype)).flatten(-2)


def lesson():
    """Print what a bit and what a small group are worth, and what an outlier costs its group."""
    torch.manual_seed(0)
    weight = torch.randn(64, 1024)
    print("error of a normal matrix, relative to its size      symmetric   asymmetric   bits per number")
    for bits, group in ((8, None), (4, None), (4, 128), (4, 32), (3, 32), (2, 32)):
        errors = []
        for symmetric in (True, False):
            rounded = dequantize(*quantize(weight, bits, group, symmetric))
            errors.append(float((rounded - weight).norm() / weight.norm()))
        cost, zero = bits + 16 / (group or 1024), 8 / (group or 1024)
        print(f"  {bits} bits, groups of {group or 1024:4d}                          {errors[0]:8.2%}   "
              f"{errors[1]:9.2%}       {cost:5.2f}, {cost + zero:5.2f}")  # fmt: skip
    weight[:, 5] *= 50
    for group in (None, 32):
        error = (dequantize(*quantize(weight, 4, group)) - weight)[:, 64:].norm() / weight[:, 64:].norm()
        print(f"one column 50 times as large, groups of {group or 1024:4d}: error of the rest {error:6.1%}")


if __name__ == "__main__":
    lesson()
