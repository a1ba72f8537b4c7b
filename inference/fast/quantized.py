"""Quantised matrices in the fast decoder: kept in the order of their operator (modules/quantized/kernels.py).

    y = product(x * factor)        factor (in,): the input's own scale times the gain of the norm before

The gain of the norm is multiplied into a matrix in full precision, but not into codes: there it scales the
input. A matrix with fewer than `SMALL` numbers is dequantised to fp32: it stays in the processor's caches,
where no operator is faster. A model that rounds inputs (W8A8) rounds them before small matrices too, so that
all paths compute the same.
"""

from functools import partial

import torch
import torch.nn.functional as F

from modules.quantized.kernels import SMALL, fast_product, numbers
from modules.quantized.layers import QuantExperts, QuantLinear, rounded


class QuantMatrix:
    """Quantised matrices with the same input, side by side.

    parts: the product of each, its factor or None, and whether its input is rounded (W8A8).
    """

    def __init__(self, parts: list):
        self.parts = parts

    def __call__(self, x):
        """x (B, in) -> (B, sum of outs)."""
        found = []
        for multiply, factor, rounds in self.parts:
            scaled = x if factor is None else x * factor
            found.append(multiply(rounded(scaled) if rounds else scaled))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def both(scale, gain):
    """Return the product of two factors (in,), of which either may be None."""
    return gain if scale is None else scale if gain is None else scale * gain


def quantized_linears(linears, dtype, gain=None) -> QuantMatrix | None:
    """Return linear layers with the same input as one matrix, or None for those that are better in fp32."""
    if any(type(linear) is not QuantLinear for linear in linears):
        return None
    large = sum(linear.in_features * linear.out_features for linear in linears) >= SMALL
    packed = large and dtype == torch.float32
    if not packed and not linears[0].activations:
        return None
    scales = [linear.input_scale for linear in linears]
    alike = all(scale is scales[0] or torch.equal(scale, scales[0]) for scale in scales)
    groups = [linears] if alike else [[linear] for linear in linears]
    parts = []
    for first, *rest in groups:
        stores = [linear.store for linear in (first, *rest)]
        multiply = fast_product(stores) if packed else partial(F.linear, weight=numbers(stores).to(dtype))
        parts.append((multiply, both(first.input_scale, gain), first.activations))
    return QuantMatrix(parts)


def quantized_experts(experts, dtype, gain) -> list[list[QuantMatrix]] | None:
    """Return E matrices (C, 2F) and E matrices (F, C), or None for those that are better in fp32."""
    plain = dtype != torch.float32 or type(experts) is not QuantExperts
    if plain or experts.down.shape[1:].numel() < SMALL:
        return None
    stacks = (experts.gate_up, both(experts.input_scale, gain)), (experts.down, experts.inner_scale)
    return [
        [QuantMatrix([(fast_product([stack], expert), factor, False)]) for expert in range(stack.shape[0])]
        for stack, factor in stacks
    ]


def each_product(rows, matrices, sizes):
    """rows (P, in), sorted by expert, `sizes` of each; matrices: one for each -> (P, out)."""
    parts = zip(rows.split(sizes), matrices, strict=True)
    return torch.cat([matrix(part) for part, matrix in parts if len(part)])
