"""The experts of a mixture, fast: tokens sorted by expert, so that one expert is a few plain products.

    rows = x[token]   (one row per token and chosen expert, sorted by expert)
    h = rows U_e^T    gate, up = halves of h    a = silu(gate) * up    out = (g * a) D_e^T
    y_n = sum of the K rows of token n

    x: (N, C)   indices, weights g: (N, K)   U: (E, 2F, C)   D: (E, C, F)   ->   y (N, C)

The backward pass is derived by hand, with dy the gradient of y at each row's token and s = sigmoid(gate):

    u = dy D_e                dg = rowsum(u * a)                           dD_e = dy^T (g * a)
    dup = g u silu(gate)      dgate = g u up (s + silu(gate) (1 - s))      dU_e = dh^T rows
    dx_n = sum of the K rows of dh U_e of token n

One expert's rows stay in the processor's cache from the first product to the last, so that what lies between
costs little and can be done in fp32: under bf16 the weights g, in fp32, meet the F inner channels before
these are rounded, once. Matrices in fp32 are cast one expert at a time, next to their product, so that no
second copy of all experts is ever written, read back or kept for the backward pass.

Rows are copied by `index_select` and added up by `embedding_bag` (a gather and a sum in one pass) and never
by atomic additions: the same input gives the same bits. Sorting in place of dropping: MegaBlocks (Gale et
al., arXiv 2211.15841).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def grouped_experts(x, indices, weights, gate_up, down):
    """x (N, C), indices and weights (N, K), gate_up (E, 2F, C), down (E, C, F) -> (N, C).

    On CUDA in bf16 PyTorch's grouped product takes over where it can (rows of whole 16 bytes): one kernel for
    all experts. It was tested on a CPU only, and not measured on a GPU.
    """
    # Under autocast the products run in its dtype, as F.linear would.
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else gate_up.dtype
    whole = down.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    if kind == "cuda" and dtype == torch.bfloat16 and whole:
        return kernel_experts(x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype))
    return GroupedExperts.apply(x, indices, weights, gate_up, down, dtype)


def kernel_experts(x, indices, weights, gate_up, down):
    """The same by `F.grouped_mm` under autograd, without waiting for the device. Shapes as above."""
    order, counts = sort_by_expert(indices, len(gate_up))
    ends = counts.cumsum(0).int()
    rows = x.repeat_interleave(indices.shape[1], dim=0)  # (N*K, C); its gradient is a sum without atomics
    hidden = F.grouped_mm(rows.index_select(0, order), gate_up.mT, offs=ends)  # (N*K, 2F)
    gate, up = hidden.chunk(2, dim=-1)
    inner = F.silu(gate) * up * weights.flatten().index_select(0, order)[:, None]
    out = F.grouped_mm(inner.to(x.dtype), down.mT, offs=ends)  # (N*K, C)
    return out.index_select(0, order.argsort()).unflatten(0, indices.shape).sum(dim=1)


def sort_by_expert(indices, experts: int):
    """indices (N, K) -> order (N*K,) of the assignments by expert, and the count of each expert (E,)."""
    flat = indices.flatten()
    counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts


def place_rows(indices, experts: int):
    """indices (N, K) -> position (N, K) of each assignment's row, and where the rows of each expert end.

    Trap: on a CPU a product in bf16 is compiled for its shape, and counts of tokens hardly ever repeat, so
    that compiling doubled the time. Each expert therefore gets some blank rows, up to a round number.
    """
    order, counts = sort_by_expert(indices, experts)
    flat, mean = indices.flatten(), len(order) // experts
    granule = 1 << max(mean // 32, 1).bit_length() - 1  # a power of two, at most 1/32 of the mean
    blank = -counts % granule
    shift = blank.cumsum(0)  # (E,) an expert's blank rows stand first, after those of the experts before
    places = torch.arange(len(flat), device=flat.device) + shift.index_select(0, flat.index_select(0, order))
    position = torch.empty_like(flat).scatter_(0, order, places)
    return position.view_as(indices), (counts + blank).cumsum(0).tolist()  # the only wait for a device


def parts(ends):
    """Ends of experts -> (expert, its rows) for every expert that has some."""
    starts = [0, *ends[:-1]]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]


def empty_gradient(stack, ends):
    """A stack for the gradients of busy experts to be written into; zeros for those without rows."""
    gradient, busy = torch.empty_like(stack), [e for e, _ in parts(ends)]
    for e in set(range(len(ends))).difference(busy):
        gradient[e] = 0
    return gradient


class GroupedExperts(torch.autograd.Function):
    """The whole routed feed-forward; P rows, blank ones included, n of them of one expert."""

    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, down, dtype):
        """x (N, C), indices and weights (N, K), gate_up (E, 2F, C), down (E, C, F) -> (N, C)."""
        position, ends = place_rows(indices, len(gate_up))
        flat, K = position.flatten(), indices.shape[1]
        # Blank rows read token 0 with weight 0, and nobody reads what comes out.
        token = flat.new_zeros(ends[-1]).scatter_(0, flat, torch.arange(len(flat), device=x.device) // K)
        g = weights.new_zeros(ends[-1]).scatter_(0, flat, weights.flatten())[:, None]  # (P, 1)
        ctx.ends = ends
        x = x.to(dtype)
        hidden = x.new_empty(len(token), gate_up.shape[1])  # (P, 2F)
        out = x.new_empty(len(token), x.shape[1])  # (P, C)
        for e, part in parts(ends):
            rows = x.index_select(0, token[part])  # (n, C)
            torch.mm(rows, gate_up[e].to(dtype).T, out=hidden[part])
            gate, up = hidden[part].to(g.dtype).chunk(2, dim=-1)  # (n, F) each
            inner = F.silu(gate).mul_(up).mul_(g[part])
            torch.mm(inner.to(dtype), down[e].to(dtype).T, out=out[part])
        ctx.save_for_backward(x, position, token, g, hidden, gate_up, down)
        return F.embedding_bag(position, out, mode="sum")  # (N, C), the K rows of each token added up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """grad (N, C) -> gradients of x, weights, gate_up and down; of those that learn, as autograd says."""
        x, position, token, g, hidden, gate_up, down = ctx.saved_tensors
        learns_x, _, learns_g, learns_gate_up, learns_down, _ = ctx.needs_input_grad
        dtype, wide = x.dtype, g.dtype
        grad = grad.to(dtype)
        grad_rows = x.new_empty(len(token), x.shape[1]) if learns_x else None  # (P, C)
        grad_g = torch.empty_like(g) if learns_g else None  # (P, 1)
        grad_gate_up = empty_gradient(gate_up, ctx.ends) if learns_gate_up else None
        grad_down = empty_gradient(down, ctx.ends) if learns_down else None
        for e, part in parts(ctx.ends):
            wide_hidden = hidden[part].to(wide, copy=True)  # (n, 2F); what is saved stays as it is
            gate, up = wide_hidden.chunk(2, dim=-1)  # (n, F) each
            grad_out = grad.index_select(0, token[part])  # (n, C)
            grad_inner = torch.mm(grad_out, down[e].to(dtype)).to(wide)  # (n, F), u above
            silu = F.silu(gate)
            inner = silu * up
            if learns_g:
                torch.sum(grad_inner * inner, dim=-1, keepdim=True, out=grad_g[part])
            if learns_down:
                grad_down[e] = torch.mm(grad_out.T, inner.mul_(g[part]).to(dtype))
            if not (learns_x or learns_gate_up):
                continue
            grad_inner.mul_(g[part])
            grad_silu = torch.mul(grad_inner, up, out=inner)  # inner is not needed any more
            torch.mul(grad_inner, silu, out=up)  # in place: gate and up become dgate and dup
            torch.ops.aten.silu_backward(grad_silu, gate, grad_input=gate)
            grad_hidden = wide_hidden.to(dtype)  # (n, 2F)
            if learns_gate_up:
                grad_gate_up[e] = torch.mm(grad_hidden.T, x.index_select(0, token[part]))
            if learns_x:
                torch.mm(grad_hidden, gate_up[e].to(dtype), out=grad_rows[part])
        grad_x = F.embedding_bag(position, grad_rows, mode="sum") if learns_x else None
        grad_weights = grad_g[:, 0][position] if learns_g else None  # (N, K)
        return grad_x, None, grad_weights, grad_gate_up, grad_down, None  # autograd casts to dtypes of inputs


def lesson():
    """What sorting does to a few tokens, what blank rows cost, and that both paths agree."""
    from modules.moe import loop_experts

    torch.manual_seed(0)
    indices = torch.rand(4, 3).topk(2).indices
    position, ends = place_rows(indices, 3)
    print("4 tokens choose 2 of 3 experts each:", *indices.tolist())
    print("their rows, sorted by expert:       ", *position.tolist(), f"  experts end at rows {ends}")
    for tokens in (64, 2048, 16384):
        indices = torch.rand(tokens, 16).topk(4).indices
        counts, rows = indices.flatten().bincount().tolist(), place_rows(indices, 16)[1][-1]
        blank = rows / (tokens * 4) - 1
        print(f"{tokens:6d} tokens, 4 of 16: {min(counts)} to {max(counts)} each, and {blank:.1%} blank rows")
    N, C, width, E = 512, 64, 32, 16
    x, gate_up, down = torch.randn(N, C), torch.randn(E, 2 * width, C) * 0.1, torch.randn(E, C, width) * 0.1
    routed = torch.rand(N, E).topk(4)
    exact = loop_experts(x.double(), routed.indices, routed.values.double(), gate_up.double(), down.double())
    for path in (loop_experts, grouped_experts):
        with torch.autocast("cpu", torch.bfloat16):
            y = path(x, routed.indices, routed.values, gate_up, down)
        print(f"{path.__name__:16s} in bf16: {(y - exact).norm() / exact.norm():.3%} from the exact result")


if __name__ == "__main__":
    lesson()
