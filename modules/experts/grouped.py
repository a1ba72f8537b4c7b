"""The experts of a mixture, fast: tokens sorted by expert, so that one expert is a few plain products.

    rows = x[token]   (one row per token and chosen expert, sorted by expert)
    h = rows U_e^T    gate, up = halves of h    a = silu(gate) * up    out = (g * a) D_e^T
    y_n = sum of the K rows of token n

    x: (N, C)   indices, weights g: (N, K)   U: (E, 2F, C)   D: (E, C, F)   ->   y (N, C)

The backward pass is derived by hand, with dy the gradient of y at each row's token and s = sigmoid(gate):

    u = dy D_e                dg = rowsum(u * a)                           dD_e = dy^T (g * a)
    dup = g u silu(gate)      dgate = g u up (s + silu(gate) (1 - s))      dU_e = dh^T rows
    dx_n = sum of the K rows of dh U_e of token n

Only the products go expert by expert; casting, copying rows and all that lies between two products is done
for all rows at once, in the dtype of the products, as in a dense feed-forward. In bf16, with 16 experts,
calls for every expert cost more than they saved in the cache (docs/experiments.md, 26). The backward pass
casts and copies a second time, so that neither copy waits in memory between the passes.

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
    """indices (N, K) -> position (N, K) of each assignment's row, and the number of rows of each expert.

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
    return position.view_as(indices), (counts + blank).tolist()  # the only wait for a device


def products(rows, stack, counts):
    """rows (P, I) by expert, stack (E, I, O) -> (P, O): every expert's rows times its matrix."""
    out = rows.new_empty(len(rows), stack.shape[2])
    for part, matrix, result in zip(rows.split(counts), stack.unbind(), out.split(counts), strict=True):
        torch.mm(part, matrix, out=result)
    return out


def outer_products(left, right, counts):
    """left (P, O) and right (P, I) by expert -> (E, O, I): left_e^T right_e, zeros without rows."""
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    for a, b, result in zip(left.split(counts), right.split(counts), out.unbind(), strict=True):
        torch.mm(a.T, b, out=result)
    return out


class GroupedExperts(torch.autograd.Function):
    """The whole routed feed-forward, on P rows, blank ones included."""

    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, down, dtype):
        """x (N, C), indices and weights (N, K), gate_up (E, 2F, C), down (E, C, F) -> (N, C)."""
        position, counts = place_rows(indices, len(gate_up))
        flat, K, P = position.flatten(), indices.shape[1], sum(counts)
        # Blank rows read token 0 with weight 0, and nobody reads what comes out.
        token = flat.new_zeros(P).scatter_(0, flat, torch.arange(len(flat), device=x.device) // K)
        g = x.new_zeros(P, dtype=dtype).scatter_(0, flat, weights.flatten().to(dtype))[:, None]  # (P, 1)
        x = x.to(dtype)
        hidden = products(x.index_select(0, token), gate_up.to(dtype).mT, counts)  # (P, 2F)
        gate, up = hidden.chunk(2, dim=-1)  # (P, F) each
        out = products(F.silu(gate).mul_(up).mul_(g), down.to(dtype).mT, counts)  # (P, C)
        ctx.counts, ctx.wide = counts, weights.dtype
        ctx.save_for_backward(x, position, token, g, hidden, gate_up, down)
        return F.embedding_bag(position, out, mode="sum")  # (N, C), the K rows of each token added up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """grad (N, C) -> gradients of x, weights, gate_up and down; of those that learn, as autograd says."""
        x, position, token, g, hidden, gate_up, down = ctx.saved_tensors
        learns_x, _, learns_g, learns_gate_up, learns_down, _ = ctx.needs_input_grad
        counts, dtype = ctx.counts, x.dtype
        grad_x = grad_g = grad_gate_up = grad_down = None
        grad_out = grad.to(dtype).index_select(0, token)  # (P, C)
        grad_inner = products(grad_out, down.to(dtype), counts)  # (P, F), u above
        gate, up = hidden.chunk(2, dim=-1)  # (P, F) each
        silu = F.silu(gate)
        inner = silu * up
        if learns_g:
            grad_g = (grad_inner * inner).sum(dim=-1, dtype=ctx.wide)[position]  # (P,) -> (N, K)
        if learns_down:
            grad_down = outer_products(grad_out, inner.mul_(g), counts)
        if learns_x or learns_gate_up:
            grad_inner.mul_(g)
            grad_silu = torch.mul(grad_inner, up, out=inner)  # inner is not needed any more
            grad_hidden = torch.empty_like(hidden)
            grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
            torch.mul(grad_inner, silu, out=grad_up)
            torch.ops.aten.silu_backward(grad_silu, gate, grad_input=grad_gate)
            if learns_gate_up:
                grad_gate_up = outer_products(grad_hidden, x.index_select(0, token), counts)
            if learns_x:
                grad_rows = products(grad_hidden, gate_up.to(dtype), counts)  # (P, C)
                grad_x = F.embedding_bag(position, grad_rows, mode="sum")
        return grad_x, None, grad_g, grad_gate_up, grad_down, None  # autograd casts to dtypes of inputs


def lesson():
    """What sorting does to a few tokens, what blank rows cost, and that both paths agree."""
    from modules.experts.moe import loop_experts

    torch.manual_seed(0)
    indices = torch.rand(4, 3).topk(2).indices
    position, rows = place_rows(indices, 3)
    print("4 tokens choose 2 of 3 experts each:", *indices.tolist())
    print("their rows, sorted by expert:       ", *position.tolist(), f"  rows of each expert: {rows}")
    for tokens in (64, 2048, 16384):
        indices = torch.rand(tokens, 16).topk(4).indices
        counts, rows = indices.flatten().bincount().tolist(), sum(place_rows(indices, 16)[1])
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
