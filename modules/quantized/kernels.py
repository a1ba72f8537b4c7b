"""Multiply a few rows by a quantised matrix, reading fewer bytes than fp32 has.

To decode one token, a CPU reads each matrix once and does two operations for each number: a matrix beyond
the caches takes as long as reading it. Dequantising it first would read more, so a product must work on
the codes. PyTorch has such operators, each with a catch:

    Int8Product    codes of 8 bits, a scale for each row; fbgemm. It multiplies integers only, so each
                   number of x becomes three digits of 7 bits, in three rows: x = u (d0 + d1/128 + d2/128^2).
                   The matrix is still read once, and the result is as exact as in fp32.
    Int4Product    codes of 4 bits, groups of 32, 64, 128 or 256. x, scales and result are rounded to bf16.
    HalfProduct    any matrix, rounded to fp16: 16 bits per number, but x stays fp32. For NF4 and other
                   formats that no operator reads.
    PlainProduct   any matrix, dequantised for each product: slow, and right everywhere.

    x (M, in), matrix (out, in)  ->  (M, out), all in fp32

Speed against fp32, one thread of an AMD EPYC without VNNI and bf16 units, matrices of 1 to 6 million numbers
read from memory, M = 1, 4 and 16: Int8Product 1.8, 2.8, 1.1; Int4Product 1.4, 2.9, 1.0; HalfProduct 1.4, 3.5,
1.9. Slower than fp32 there: `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` on fp32 inputs (0.1),
`_int_mm` (0.1), `_dyn_quant_matmul_4bit` (0.1), `onednn.qlinear_pointwise` (0.7), and any of them on a matrix
that stays in the caches (`SMALL`).

Trap: without VNNI, fbgemm adds two products of 8 x 8 bits in 16 bits, which saturates silently: with all
inputs at their maximum, the result is half of what it should be. Digits of 7 bits always fit.
"""

import functools
import warnings

import torch
import torch.nn.functional as F

from modules.quantized.integers import Codes
from modules.quantized.stored import SHIFT, StoredIntegers

SMALL = 2**20  # numbers of a matrix, 4 MB in fp32; a smaller one stays in the caches, and fp32 is faster
DIGITS = (1.0, 128.0, 128.0**2)
GROUPS = (256, 128, 64, 32)  # that the operator for 4 bits has, the cheapest first


def packed(prepack):
    """Call `prepack` for fbgemm. PyTorch warns that it will drop quantised tensors; `sound` would notice."""
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return prepack()
    finally:
        torch.backends.quantized.engine = before


class Int8Product:
    """Exact product with int8 codes. `error`: at most, in units of max|x| * sum|w| of a row."""

    error = 2.0**-19  # the last digit is rounded to max|x| / 63 / 2^15; the rest is fp32

    def __init__(self, matrix: Codes):
        zeros, scales = torch.zeros(len(matrix.codes), dtype=torch.long), matrix.scales[:, 0].double()
        self.packed = packed(lambda: torch.ops.quantized.linear_prepack(
            torch._make_per_channel_quantized_tensor(matrix.codes, scales, zeros, 0), None))  # fmt: skip
        self.multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        self.digits = torch.tensor(DIGITS)

    def __call__(self, x):
        """x (M, in) -> (M, out)."""
        M, n = len(x), len(DIGITS)
        unit = x.abs().amax(1, True).div_(63).clamp_min_(torch.finfo(torch.float32).tiny * 2**24)  # (M, 1)
        whole = torch.mul(x[:, None], (self.digits / unit)[:, :, None]).round_()  # (M, n, in), below 2^20
        rows = torch.empty_like(whole)
        rows[:, 0] = whole[:, 0]
        torch.sub(whole[:, 1:], whole[:, :-1], alpha=128, out=rows[:, 1:])  # -64 .. 64
        y = self.multiply(rows.view(M * n, -1), 1.0, 64, self.packed)  # scale 1, zero point 64
        return torch.bmm((unit / self.digits)[:, None], y.view(M, n, -1))[:, 0]  # (M, 1, n) (M, n, out)


class Int4Product:
    """Product with codes of 4 bits: w = (q - 8) s + z, s and z in bf16."""

    error = 2.0**-6  # four roundings to 8 bits: of x, s, z and y; (q - 8) s and z may partly cancel

    def __init__(self, matrix: Codes):
        codes, scales = matrix.codes.int(), matrix.scales.float()
        shift = torch.zeros_like(scales) if matrix.zeros is None else (8 - matrix.zeros.float()) * scales
        codes = codes + SHIFT if matrix.zeros is None else codes
        width = codes.shape[1] // scales.shape[1]
        self.group = next(group for group in GROUPS if width % group == 0)
        both = torch.stack([scales, shift], dim=-1).repeat_interleave(width // self.group, dim=1)
        self.scales = both.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    def __call__(self, x):
        """x (M, in) -> (M, out)."""
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
        return operator(x.bfloat16(), self.packed, self.group, self.scales).float()


class HalfProduct:
    """Product with a matrix (out, in) in fp16, each row divided by its largest number."""

    error = 2.0**-11

    def __init__(self, weight):
        self.largest = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)  # (out,)
        rows = weight / self.largest[:, None]
        self.packed = packed(lambda: torch.ops.quantized.linear_prepack_fp16(rows, None))

    def __call__(self, x):
        """x (M, in) -> (M, out)."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed).mul_(self.largest)


class PlainProduct:
    """Product with stores side by side, dequantised each time. Arguments as in `fast_product`."""

    def __init__(self, stores, expert: int | None = None):
        self.stores, self.expert = stores, expert

    def __call__(self, x):
        """x (M, in) -> (M, out)."""
        return F.linear(x, numbers(self.stores, self.expert))


def numbers(stores, expert: int | None = None):
    """Return the matrices of the stores, or of one expert of their stacks, as one (sum of outs, in)."""
    matrices = [store.dequantize() for store in stores]
    return torch.cat(matrices if expert is None else [stack[expert] for stack in matrices])


def joined_codes(stores, expert: int | None) -> Codes:
    """Return what `numbers` returns as `Codes`, from `StoredIntegers` of one format."""
    parts = zip(*[(store.unpacked(), store.scales, store.zeros) for store in stores], strict=True)
    pick = slice(None) if expert is None else expert
    return Codes(*(None if each[0] is None else torch.cat([one[pick] for one in each]) for each in parts))


def kind_of(stores):
    """Return the class of product for these stores, which have the same input (in)."""
    if any(type(store) is not StoredIntegers for store in stores):
        return HalfProduct
    formats = {(store.bits, store.group_size, store.symmetric) for store in stores}
    bits, group, symmetric = next(iter(formats))
    if len(formats) == 1 and bits == 8 and group is None and symmetric:
        return Int8Product
    fits = (group or stores[0].shape[-1]) % GROUPS[-1] == 0 and sum(one.shape[-2] for one in stores) % 16 == 0
    return Int4Product if len(formats) == 1 and bits == 4 and fits else HalfProduct


def fast_product(stores, expert: int | None = None):
    """Return the fastest product that is right here, for stores (out, in) with the same input, or for one
    expert of stacks (E, out, in)."""
    kind = kind_of(stores)
    if kind is not HalfProduct and sound(kind):
        return kind(joined_codes(stores, expert))
    return HalfProduct(numbers(stores, expert)) if sound(HalfProduct) else PlainProduct(stores, expert)


@functools.cache
def sound(kind) -> bool:
    """Return True if this machine has the operator and it is right, also where integers might overflow."""
    half, generator = 8 if kind is Int4Product else 128, torch.Generator().manual_seed(0)
    codes = torch.randint(-half, half, (32, 64), dtype=torch.int8, generator=generator)
    codes[0], codes[1] = -half, half - 1
    x = torch.tensor([[1.0], [-1.0], [0.0], [1.0]]).repeat(1, 64)
    x[3].uniform_(-1, 1, generator=generator)
    matrix = Codes(codes, torch.ones(32, 1), None)
    try:
        found = kind(codes.float() if kind is HalfProduct else matrix)(x).double()
    except (RuntimeError, AttributeError):  # not in this build of PyTorch, or not on this processor
        return False
    bound = x.abs().amax(1, True).double() * codes.double().abs().sum(1) * kind.error
    return bool(((found - x.double() @ codes.double().T).abs() <= bound).all())


def lesson():
    """Print the time and the error of one token's product in each format, beside fp32."""
    from time import perf_counter

    from modules.quantized.stored import StoredNF4

    torch.manual_seed(0)
    x, weight = torch.randn(1, 1024), torch.randn(3072, 1024)
    stores = {"int8": StoredIntegers(weight.shape, 8), "int4": StoredIntegers(weight.shape, 4, 32)}
    stores["NF4"] = StoredNF4(weight.shape)
    products = {name: fast_product([store.round(weight)]) for name, store in stores.items()}
    products["fp32"], times = lambda x: F.linear(x, weight), {name: [] for name in (*stores, "fp32")}
    print("one row times 3072 x 1024 numbers, the best of 20 turns")
    for _ in range(20):
        for name, product in products.items():
            start = perf_counter()
            product(x)
            times[name].append(perf_counter() - start)
    for name, product in products.items():
        exact = x.double() @ (stores[name].dequantize() if name in stores else weight).double().T
        error = float((product(x) - exact).norm() / exact.norm())
        kind = type(product).__name__.replace("function", "F.linear")
        print(f"  {name:4s}  {kind:11s}  {1e6 * min(times[name]):5.0f} us, error {error:.0e}")


if __name__ == "__main__":
    lesson()
