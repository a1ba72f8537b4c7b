"""Run the experts of a mixture fast: sort tokens by expert, so that each expert is a few plain products.

    rows   = x[token]                     one row per token and chosen expert, sorted by expert
    hidden = rows U_e^T                   gate, up = halves of hidden
    inner  = silu(gate) * up              for all rows at once
    y_n    = sum of g * row over the K rows of token n in  inner D_e^T

    x: (N, C)   indices, weights g: (N, K)   U: (E, 2F, C)   D: (E, C, F)   P rows   ->   y (N, C)

`loop_experts` in modules/experts/moe.py is the reference. Only the products run expert by expert. `Dispatch`
copies tokens to rows and multiplies them, `Combine` multiplies rows and adds them up per token, each with its
weight; one mirrors the other, and so do their backward passes. Between them is plain PyTorch.

No token is dropped: MegaBlocks (Gale et al., arXiv 2211.15841). Rows are copied by `index_select` and added
up by `embedding_bag`, never by atomic additions: the same input gives the same bits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class Rows(NamedTuple):
    """The rows of one batch, sorted by expert. The first rows of an expert may be blank: they hold zeros."""

    position: torch.Tensor  # (N, K), the row of each assignment
    token: torch.Tensor  # (P,), the token of each row; 0 for blank rows
    blank: torch.Tensor  # the blank rows
    sizes: torch.Tensor | list[int]  # (E,), rows of each expert; a tensor if one kernel does all experts


def grouped_experts(x, indices, weights, gate_up, down):
    """x (N, C), indices and weights (N, K), gate_up (E, 2F, C), down (E, C, F) -> (N, C)."""
    if torch.compiler.is_compiling():  # shapes follow the router's choice, so each step would recompile
        return torch.compiler.disable(grouped_experts)(x, indices, weights, gate_up, down)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # the products run in its dtype, as F.linear would
        dtype = torch.get_autocast_dtype(kind)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    rows = sort_rows(indices, len(gate_up), one_kernel=has_kernel(gate_up, down))
    gate, up = Dispatch.apply(x, gate_up, rows).chunk(2, dim=-1)  # (P, F) each
    return Combine.apply(F.silu(gate) * up, weights.to(x.dtype), down, rows)


def has_kernel(gate_up, down) -> bool:
    """Return True if PyTorch's grouped product fits: bf16, rows in multiples of 16 bytes, Ampere or newer.

    It needs no counts on the host, so nothing waits for the GPU. Tested on a CPU only, not measured on a GPU.
    """
    whole = gate_up.shape[2] % 8 == 0 and down.shape[2] % 8 == 0
    fits = gate_up.device.type == "cuda" and gate_up.dtype == torch.bfloat16 and whole
    return fits and torch.cuda.get_device_capability(gate_up.device) >= (8, 0)


def sort_rows(indices, experts: int, one_kernel: bool = False) -> Rows:
    """Sort the assignments `indices` (N, K) by expert.

    Trap: on a CPU, oneDNN compiles and keeps a kernel of 640 KiB for each shape, and token counts hardly ever
    repeat. The rows of each expert are therefore padded with blank ones to a multiple of a power of two that
    is at most 1/16 of the mean count. One kernel for all experts needs no padding.
    """
    flat, K = indices.flatten(), indices.shape[1]
    counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)  # assignments by expert
    place = torch.arange(len(flat), device=flat.device)
    sizes = counts
    if not one_kernel:
        share = len(flat) // experts // 16
        multiple = 2 ** (share.bit_length() - 1) if share else 1
        blank = -counts % multiple
        place = place + blank.cumsum(0).index_select(0, flat.index_select(0, order))
        sizes = (counts + blank).tolist()  # the only wait for a device
    P = len(flat) if one_kernel else sum(sizes)
    position = torch.empty_like(flat).scatter_(0, order, place)
    token = flat.new_full((P,), -1).scatter_(0, position, torch.arange(len(flat), device=flat.device) // K)
    blank = flat[:0] if len(flat) == P else (token < 0).nonzero().flatten()
    return Rows(position.view_as(indices), token.clamp_(min=0), blank, sizes)


def take_rows(x, rows: Rows):
    """x (N, C) -> (P, C), zeros in blank rows: an overflow of a real token must not reach another expert."""
    return x.index_select(0, rows.token).index_fill_(0, rows.blank, 0)


def add_rows(out, rows: Rows, weights=None):
    """out (P, C), weights (N, K) -> (N, C), the weighted sum of the K rows of each token."""
    return F.embedding_bag(rows.position, out, mode="sum", per_sample_weights=weights)


def products(left, stack, sizes):
    """left (P, I) by expert, stack (E, I, O) -> (P, O): the rows of each expert times its matrix."""
    if torch.is_tensor(sizes):
        return F.grouped_mm(left, stack, offs=sizes.cumsum(0).int())
    out = left.new_empty(len(left), stack.shape[2])
    for part, matrix, result in zip(left.split(sizes), stack.unbind(), out.split(sizes), strict=True):
        torch.mm(part, matrix, out=result)
    return out


def outer_products(left, right, sizes):
    """left (P, O) and right (P, I) by expert -> (E, O, I): left_e^T right_e, zeros for an idle expert."""
    if torch.is_tensor(sizes):  # on some GPUs the kernel leaves garbage for idle experts (pytorch#172439)
        out = F.grouped_mm(left.T, right, offs=sizes.cumsum(0).int())
        return out.masked_fill_((sizes == 0)[:, None, None], 0)
    out = left.new_empty(len(sizes), left.shape[1], right.shape[1])
    for a, b, result in zip(left.split(sizes), right.split(sizes), out.unbind(), strict=True):
        torch.mm(a.T, b, out=result)
    return out


class Dispatch(torch.autograd.Function):
    """Tokens times their experts' matrices: x (N, I), stack (E, O, I) -> (P, O). Keeps x, not its copies."""

    @staticmethod
    def forward(ctx, x, stack, rows):
        """Copy tokens to rows and multiply."""
        ctx.rows = rows
        ctx.save_for_backward(x, stack)
        return products(take_rows(x, rows), stack.mT, rows.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """grad (P, O) -> gradients of x and stack, each if needed."""
        (x, stack), rows = ctx.saved_tensors, ctx.rows
        grad_x = grad_stack = None
        if ctx.needs_input_grad[0]:
            grad_x = add_rows(products(grad, stack, rows.sizes), rows)
        if ctx.needs_input_grad[1]:
            grad_stack = outer_products(grad, take_rows(x, rows), rows.sizes)
        return grad_x, grad_stack, None


class Combine(torch.autograd.Function):
    """Rows times their experts' matrices, weighted and added up per token.

    inner (P, I), weights (N, K), stack (E, O, I) -> (N, O). The gradient of a weight is the dot product of
    a row of inner and its gradient, which is needed anyway, so the rows that are summed need not be kept.
    """

    @staticmethod
    def forward(ctx, inner, weights, stack, rows):
        """Multiply and add up."""
        ctx.rows = rows
        ctx.save_for_backward(inner, weights, stack)
        return add_rows(products(inner, stack.mT, rows.sizes), rows, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """grad (N, O) -> gradients of inner, weights and stack, each if needed."""
        (inner, weights, stack), rows = ctx.saved_tensors, ctx.rows
        grad_inner = grad_weights = grad_stack = None
        places, grad = rows.position.flatten(), take_rows(grad, rows)
        g = weights.new_zeros(len(inner), 1).index_copy_(0, places, weights.reshape(-1, 1))  # (P, 1)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_inner = products(grad, stack, rows.sizes)  # still without g
            wide = torch.promote_types(weights.dtype, torch.float32)
            per_row = (grad_inner * inner).sum(dim=-1, dtype=wide)  # (P,)
            grad_weights = per_row.index_select(0, places).view_as(weights).to(weights.dtype)
            grad_inner *= g
        if ctx.needs_input_grad[2]:
            grad_stack = outer_products(grad, inner * g, rows.sizes)
        return grad_inner, grad_weights, grad_stack, None


def lesson():
    """Sort a few tokens, count blank rows, and compare both paths with the exact result."""
    from modules.experts.moe import loop_experts

    torch.manual_seed(0)
    indices = torch.rand(4, 3).topk(2).indices
    print("4 tokens choose 2 of 3 experts each:", *indices.tolist())
    print("their rows, sorted by expert:       ", *sort_rows(indices, 3).position.tolist())
    for tokens in (64, 2048, 16384):
        indices = torch.rand(tokens, 16).topk(4).indices
        counts, rows = indices.flatten().bincount().tolist(), sort_rows(indices, 16)
        share = len(rows.blank) / (tokens * 4)
        print(f"{tokens:6d} tokens, 4 of 16: {min(counts)} to {max(counts)} each, and {share:.1%} blank rows")
    x, gate_up, down = torch.randn(512, 64), torch.randn(16, 64, 64) * 0.1, torch.randn(16, 64, 32) * 0.1
    weights, indices = torch.rand(512, 16).topk(4)
    exact = loop_experts(x.double(), indices, weights.double(), gate_up.double(), down.double())
    for path in (loop_experts, grouped_experts):
        with torch.autocast("cpu", torch.bfloat16):
            y = path(x, indices, weights, gate_up, down)
        print(f"{path.__name__:16s} in bf16: {(y - exact).norm() / exact.norm():.3%} from the exact result")


if __name__ == "__main__":
    lesson()
