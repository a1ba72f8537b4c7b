"""NF4: 16 codes that fit normally distributed numbers, and double quantisation of the scales (QLoRA).

    s = max|w| of a block of 64        code = the nearest of 16 levels to w / s        w' = level[code] * s

The levels are quantiles of the normal distribution, scaled to -1 .. 1: close together where numbers are
frequent. One of the 16 is exactly 0, so they are not mirrored: there are 8 positive and 7 negative ones.

A scale in fp32 costs 32/64 = 0.5 bit per number. Double quantisation stores the scales themselves in 8 bits:
minus their mean, in blocks of 256, each with a scale of its own: 8/64 + 32/(64 * 256) = 0.127 bits. Their
256 levels are the dynamic map of bitsandbytes: seven powers of ten with 1, 2, .. 64 evenly spaced levels, of
both signs, and 0 and 1. As with floating-point numbers, the error is small where the number is.

    weight (.., out, in)  ->  codes (n,) of 0 .. 15 of the flattened numbers, scales (n / 64,)

Paper: Dettmers et al., arXiv 2305.14314 (section 3, appendix E); dynamic map: arXiv 1511.04561. As in
bitsandbytes, blocks run through the flattened matrix, over the ends of its rows.
Trap: a block of zeros has the scale 0, and 0 / 0 is NaN. Divide by `TINY`: its codes are then those of 0.
Trap: a number at the middle between two levels gets the lower one, and w * (1 / s) is not always w / s.
"""

from functools import cache

import torch
import torch.nn.functional as F

BLOCK, SCALE_BLOCK, TINY = 64, 256, 1e-38
LEVELS = (  # table of the paper (appendix E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


def blocks(numbers, size: int):
    """numbers (..) -> (n, size), zeros at the end."""
    flat = numbers.flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def nearest(parts, levels):
    """Parts (n, size) -> the largest |number| of each (n,), and codes (n, size) of the levels, sorted."""
    scales = parts.abs().amax(dim=1)
    middles = (levels[1:] + levels[:-1]) / 2  # between two levels
    return scales, torch.bucketize(parts * (1.0 / scales.clamp(min=TINY))[:, None], middles).to(torch.uint8)


def quantize_nf4(weight):
    """weight (.., out, in) -> codes (n,) uint8 of all numbers, and scales (ceil(n / 64),)."""
    scales, codes = nearest(blocks(weight.float(), BLOCK), torch.tensor(LEVELS, device=weight.device))
    return codes.flatten()[: weight.numel()], scales


@cache
def level_pairs():
    """Return the levels of the two codes in each byte (256, 2), the first in the high half."""
    return torch.cartesian_prod(torch.tensor(LEVELS), torch.tensor(LEVELS))


def dequantize_nf4(packed, scales):
    """packed (n / 2,) uint8, two codes in a byte (modules/quantized/packing.py), scales (ceil(n / 64),)
    -> (n,) in fp32. One look-up for two numbers takes half the time of one for each."""
    numbers = F.embedding(packed.int(), level_pairs().to(packed.device)).flatten()  # (n,)
    whole = len(numbers) // BLOCK * BLOCK
    numbers[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
    numbers[whole:] *= scales[-1]
    return numbers


@cache
def scale_levels():
    """Return the dynamic map (256,): 10^e times the middles of 2^(e + 6) steps from 0.1 to 1, e = -6 .. 0."""
    levels = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        steps = torch.linspace(0.1, 1, 2**power + 1)
        middles = (steps[1:] + steps[:-1]) / 2 * 10.0 ** (power - 6)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


def quantize_scales(scales):
    """scales (n,) -> codes (n,) uint8, their scales (ceil(n / 256),) and mean ()."""
    mean = scales.mean()
    steps, codes = nearest(blocks(scales - mean, SCALE_BLOCK), scale_levels().to(scales.device))
    return codes.flatten()[: len(scales)].clone(), steps, mean  # a view would keep the whole block alive


def dequantize_scales(codes, steps, mean):
    """Return the scales (n,)."""
    levels = scale_levels().to(codes.device)[codes.long()]
    return (blocks(levels, SCALE_BLOCK) * steps[:, None]).flatten()[: len(codes)] + mean


def lesson():
    """Compare NF4 with 16 evenly spaced levels on normal numbers, and print what scales cost."""
    from modules.quantized import integers
    from modules.quantized.packing import pack

    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    codes, scales = quantize_nf4(weight)
    packed = pack(codes)
    share = codes.bincount(minlength=16) / len(codes)
    even = integers.dequantize(*integers.quantize(weight, 4, BLOCK))
    error = lambda found: float((found.view_as(weight) - weight).norm() / weight.norm())  # noqa: E731
    print("NF4: share of each code, in percent:", *[f"{100 * one:.0f}" for one in share.tolist()])
    found = error(dequantize_nf4(packed, scales))
    print(f"  error, blocks of 64: {found:.2%}; even steps: {error(even):.2%}")
    rough = dequantize_scales(*quantize_scales(scales))
    print(f"  with scales in 8 bits: {error(dequantize_nf4(packed, rough)):.2%}")
    print(f"  bits per number: 4 + {32 / 64:.3f}; with scales in 8 bits: 4 + {8 / 64 + 32 / 64 / 256:.3f}")


if __name__ == "__main__":
    lesson()
