"""Matrices as a quantised model keeps them: codes and scales in buffers, and the way back to numbers.

    integers    codes (.., out, in) int8, or two of 4 bits in a byte; scales, zeros (.., out, groups)
    NF4         codes of the flattened matrix, two in a byte; a scale for each block of 64

`dequantize()` returns the matrix (.., out, in) in fp32. Buffers are part of the state dict, so a checkpoint
of a quantised model is as small as the model. A store starts empty, to be filled by `round` or from a
checkpoint; its memory is not touched until then.
"""

import math

import torch
from torch import nn

from modules.quantized import integers, nf4
from modules.quantized.packing import pack, unpack

SHIFT = 8  # symmetric codes of 4 bits are -8 .. 7 and stored as 0 .. 15


class StoredIntegers(nn.Module):
    """A matrix or stack of shape (.., out, in) as integers of 4 or 8 bits, empty until `put`.

    Scales of whole rows are fp32; those of groups are fp16, so that they cost 16/g bits per number.
    """

    def __init__(self, shape, bits: int, group_size: int | None = None, symmetric: bool = True):
        super().__init__()
        self.shape, self.bits, self.group_size = torch.Size(shape), bits, group_size
        self.symmetric, (*rows, width) = symmetric, self.shape
        for size in (group_size or width, 8 // bits):  # 8 // bits codes fill a byte
            if width % size:
                raise ValueError(f"groups of {size} do not divide rows of {width}")
        groups = width // (group_size or width)
        stored = torch.int8 if symmetric and bits == 8 else torch.uint8
        self.scale_dtype = torch.float16 if group_size else torch.float32
        self.register_buffer("codes", torch.empty(*rows, width * bits // 8, dtype=stored))
        self.register_buffer("scales", torch.empty(*rows, groups, dtype=self.scale_dtype))
        self.register_buffer("zeros", None if symmetric else torch.empty(*rows, groups, dtype=torch.uint8))

    def round(self, weight) -> "StoredIntegers":
        """Take the codes nearest to weight (.., out, in); return self."""
        form = (self.bits, self.group_size, self.symmetric, self.scale_dtype)
        return self.put(*integers.quantize(weight.detach().float(), *form))

    def put(self, codes, scales, zeros=None) -> "StoredIntegers":
        """Take codes (.., out, in), scales and zeros (.., out, groups), as `Codes` has them; return self.

        Trap: codes belong to their scales. Those found for scales in fp32 do not fit scales rounded to fp16.
        """
        if scales.dtype != self.scale_dtype:
            raise ValueError(
                f"scales in {scales.dtype}, stored in {self.scale_dtype}: round with scale_dtype"
            )
        shift = SHIFT if self.symmetric else 0
        self.codes = pack(codes + shift) if self.bits == 4 else codes
        self.scales, self.zeros = scales, zeros
        return self

    def unpacked(self):
        """Return the codes (.., out, in): int8, or uint8 if they have zeros."""
        if self.bits == 8:
            return self.codes
        codes = unpack(self.codes)
        return codes.to(torch.int8) - SHIFT if self.symmetric else codes

    def dequantize(self):
        """Return the matrix (.., out, in) in fp32."""
        return integers.dequantize(self.unpacked(), self.scales, self.zeros)


class StoredNF4(nn.Module):
    """A matrix or stack of shape (.., out, in) as NF4, empty until `round`."""

    def __init__(self, shape, double_quant: bool = False):
        super().__init__()
        self.shape, self.double_quant, numbers = torch.Size(shape), double_quant, math.prod(shape)
        if numbers % 2:
            raise ValueError(f"{numbers} numbers do not fill whole bytes with codes of 4 bits")
        count = math.ceil(numbers / nf4.BLOCK)
        self.register_buffer("codes", torch.empty(numbers // 2, dtype=torch.uint8))
        stored = torch.uint8 if double_quant else torch.float32
        self.register_buffer("scales", torch.empty(count, dtype=stored))
        steps = math.ceil(count / nf4.SCALE_BLOCK)
        self.register_buffer("steps", torch.empty(steps) if double_quant else None)
        self.register_buffer("mean", torch.empty(()) if double_quant else None)

    def round(self, weight) -> "StoredNF4":
        """Take the codes nearest to weight (.., out, in); return self."""
        codes, scales = nf4.quantize_nf4(weight.detach())
        self.codes = pack(codes)
        if self.double_quant:
            self.scales, self.steps, self.mean = nf4.quantize_scales(scales)
        else:
            self.scales = scales
        return self

    def dequantize(self):
        """Return the matrix (.., out, in) in fp32."""
        double = self.double_quant
        scales = nf4.dequantize_scales(self.scales, self.steps, self.mean) if double else self.scales
        return nf4.dequantize_nf4(self.codes, scales).view(self.shape)


def empty_store(shape, quant) -> StoredIntegers | StoredNF4:
    """Return an empty store of this shape in the format of `quant` (config/quant.py)."""
    if quant.method == "nf4":
        return StoredNF4(shape, quant.double_quant)
    return StoredIntegers(shape, quant.bits, quant.group_size, quant.symmetric)


def lesson():
    """Print the memory of one matrix in each format, and its error."""
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    print(f"a matrix of {weight.numel():,} numbers, {weight.nbytes:,} bytes in fp32")
    eight, four = StoredIntegers(weight.shape, 8), StoredIntegers(weight.shape, 4, 32)
    zeros = StoredIntegers(weight.shape, 4, 32, symmetric=False)
    stores = {"int8": eight, "int4, groups of 32": four, "the same with zeros": zeros}
    stores |= {"NF4": StoredNF4(weight.shape), "NF4, double": StoredNF4(weight.shape, double_quant=True)}
    for name, store in stores.items():
        error = (store.round(weight).dequantize() - weight).norm() / weight.norm()
        size = sum(buffer.nbytes for buffer in store.buffers())
        print(f"  {name:20s} {size:8,} bytes   {8 * size / weight.numel():.3f} bits   error {error:6.2%}")


if __name__ == "__main__":
    lesson()
