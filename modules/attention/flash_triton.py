"""Flash attention as a Triton kernel: what GPUs run where PyTorch has no kernel for a mask and shared keys.

Each program takes one tile of queries and walks over the tiles of keys; only scores of one tile exist, in
registers. With S = scale * Q K^T, P = softmax(S), O = P V (Dao et al., arXiv 2205.14135, 2307.08691):

    forward    m' = max(m, rowmax S)   P = exp(S - m')   a = exp(m - m')   l = a l + rowsum P   O = a O + P V
               at the end  O = O / l,  LSE = m + ln l
    backward   P = exp(S - LSE)        dP = dO V^T       D = rowsum(dO * O)         dS = P * (dP - D)
               dQ = scale * dS K       dK = scale * dS^T Q       dV = P^T dO        (summed over the group)

    q, dQ: (B, H, T, D)   k, dK: (B, G, S, D)   v, dV: (B, G, S, E)   O: (B, H, T, E)   LSE: (B, H, T) fp32

No mask is stored: queries and keys are boxes (modules/attention/boxes.py), which see each other if they
overlap, and tiles that cannot meet are skipped.

Traps: TRITON_INTERPRET=1, which runs kernels in NumPy, is read where a kernel is decorated, and for Triton's
own functions when it is imported: set it before Python starts. It cannot multiply bf16.
"""

import torch
from torch.autograd.function import once_differentiable

from modules.attention.boxes import FAR, plan
from modules.attention.context import AttentionContext, Rules

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # PyTorch for CUDA brings it along; elsewhere the kernels are only read
    triton, jit, constexpr = None, lambda kernel: kernel, int

TILE = 64  # queries or keys at most
BEYOND = constexpr(FAR + 1)  # kernels may only read globals that are declared constant


@jit
def fetch(x, strides, row, head, i, size, d, width):
    """Load x[row, head, i, d] of (B, heads, size, width) for vectors i and d; zeros outside.

    Trap: offsets into a large tensor exceed 32 bits; row and head have 64.
    """
    at = x + row * strides[0] + head * strides[1] + i.to(tl.int64)[:, None] * strides[2] + d[None] * strides[3]
    return tl.load(at, (i < size)[:, None] & (d < width)[None], 0.0)


@jit
def put(x, strides, row, head, i, size, d, width, value):
    """Store what `fetch` loads."""
    at = x + row * strides[0] + head * strides[1] + i.to(tl.int64)[:, None] * strides[2] + d[None] * strides[3]
    tl.store(at, value, (i < size)[:, None] & (d < width)[None])


@jit
def box(boxes, row, i, size):
    """Load the boxes i of (B, 4, size): low, high, first, last. Beyond the end they are empty."""
    at, inside = boxes + row * 4 * size + i, i < size
    low, high = tl.load(at, inside, BEYOND), tl.load(at + size, inside, -BEYOND)
    return low, high, tl.load(at + 2 * size, inside, BEYOND), tl.load(at + 3 * size, inside, -BEYOND)


@jit
def meet(a, b):
    """Whether each box of a overlaps each of b: (N), (M) -> (N, M)."""
    indices = (a[0][:, None] <= b[1][None]) & (b[0][None] <= a[1][:, None])
    return indices & (a[2][:, None] <= b[3][None]) & (b[2][None] <= a[3][:, None])


@jit
def span(own, others, row, size, TILES: constexpr):
    """The first of the other tiles that meets this program's own, and the one after the last."""
    tile = tl.arange(0, TILES)
    mine = box(own, row, tl.program_id(0) + tl.arange(0, 1), tl.num_programs(0))
    near = meet(mine, box(others, row, tile, size))  # (1, TILES)
    return tl.min(tl.where(near, tile[None], size)), tl.max(tl.where(near, tile[None] + 1, 0))


@jit(do_not_specialize=["T", "S"])
def forward_kernel(
    q, k, v, out, lse, plan, strides, scale, T, S, R, D: constexpr, E: constexpr, WIDTH: constexpr,
    WIDTH_V: constexpr, TILE: constexpr, TILES: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Compute O and LSE of one tile of queries of one head."""
    row, head, tile = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, TILE)
    t, d, e = tl.program_id(0) * TILE + tile, tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    Q, queries = fetch(q, strides[0], row, head, t, T, d, D), box(plan[0], row, t, T)
    m, l = tl.full([TILE], float("-inf"), tl.float32), tl.full([TILE], 0.0, tl.float32)
    O = tl.full([TILE, WIDTH_V], 0.0, tl.float32)
    start, stop = span(plan[2], plan[3], row, tl.cdiv(S, TILE), TILES)
    for number in range(start, stop):
        s = number * TILE + tile
        K = fetch(k, strides[1], row, head // R, s, S, d, D)
        V = fetch(v, strides[2], row, head // R, s, S, e, E)
        x = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * scale
        x = tl.where(meet(queries, box(plan[1], row, s, S)), x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # trap: no key yet, and -inf - -inf is NaN
        P, a = tl.exp(x - safe[:, None]), tl.exp(m - safe)
        l = l * a + tl.sum(P, 1)
        O = O * a[:, None] + tl.dot(P.to(V.dtype), V, input_precision=PRECISION)
        m = top
    some = tl.where(l > 0, l, 1.0)  # a query that sees nothing: O = 0, and LSE = inf so that P = exp(-inf)
    put(out, strides[3], row, head, t, T, e, E, O / some[:, None])
    at = (row * tl.num_programs(1) + head) * T + t
    tl.store(lse + at, tl.where(l > 0, m + tl.log(some), float("inf")), t < T)


@jit(do_not_specialize=["T", "S"])
def query_kernel(
    q, k, v, grad, lse, delta, dq, plan, strides, scale, T, S, R, D: constexpr, E: constexpr,
    WIDTH: constexpr, WIDTH_V: constexpr, TILE: constexpr, TILES: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Compute dQ of one tile of queries of one head. `grad` is dO, `delta` is D of the formula."""
    row, head, tile = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, TILE)
    t, d, e = tl.program_id(0) * TILE + tile, tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    Q, queries = fetch(q, strides[0], row, head, t, T, d, D), box(plan[0], row, t, T)
    dO = fetch(grad, strides[3], row, head, t, T, e, E)
    at = (row * tl.num_programs(1) + head) * T + t
    L, mean = tl.load(lse + at, t < T, float("inf")), tl.load(delta + at, t < T, 0.0)
    dQ = tl.full([TILE, WIDTH], 0.0, tl.float32)
    start, stop = span(plan[2], plan[3], row, tl.cdiv(S, TILE), TILES)
    for number in range(start, stop):
        s = number * TILE + tile
        K = fetch(k, strides[1], row, head // R, s, S, d, D)
        V = fetch(v, strides[2], row, head // R, s, S, e, E)
        x = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * scale
        x = tl.where(meet(queries, box(plan[1], row, s, S)), x, float("-inf"))
        dS = tl.exp(x - L[:, None]) * (tl.dot(dO, tl.trans(V), input_precision=PRECISION) - mean[:, None])
        dQ += tl.dot(dS.to(K.dtype), K, input_precision=PRECISION)
    put(dq, strides[4], row, head, t, T, d, D, dQ * scale)


@jit(do_not_specialize=["T", "S"])
def key_kernel(
    q, k, v, grad, lse, delta, dk, dv, plan, strides, scale, T, S, R, D: constexpr, E: constexpr,
    WIDTH: constexpr, WIDTH_V: constexpr, TILE: constexpr, TILES: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Compute dK and dV of one tile of keys: one program sums over the R heads of the group, so that none
    adds to what another one writes. Scores are transposed: rows are keys, columns queries."""
    row, group, tile = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, TILE)
    s, d, e = tl.program_id(0) * TILE + tile, tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    K, keys = fetch(k, strides[1], row, group, s, S, d, D), box(plan[1], row, s, S)
    V = fetch(v, strides[2], row, group, s, S, e, E)
    dK, dV = tl.full([TILE, WIDTH], 0.0, tl.float32), tl.full([TILE, WIDTH_V], 0.0, tl.float32)
    start, stop = span(plan[3], plan[2], row, tl.cdiv(T, TILE), TILES)
    for head in range(group * R, group * R + R):
        for number in range(start, stop):
            t = number * TILE + tile
            Q = fetch(q, strides[0], row, head, t, T, d, D)
            dO = fetch(grad, strides[3], row, head, t, T, e, E)
            at = (row * tl.num_programs(1) * R + head) * T + t
            L, mean = tl.load(lse + at, t < T, float("inf")), tl.load(delta + at, t < T, 0.0)
            x = tl.dot(K, tl.trans(Q), input_precision=PRECISION) * scale
            x = tl.where(meet(keys, box(plan[0], row, t, T)), x, float("-inf"))
            P = tl.exp(x - L[None])
            dV += tl.dot(P.to(dO.dtype), dO, input_precision=PRECISION)
            dS = P * (tl.dot(V, tl.trans(dO), input_precision=PRECISION) - mean[None])
            dK += tl.dot(dS.to(Q.dtype), Q, input_precision=PRECISION)
    put(dk, strides[4], row, group, s, S, d, D, dK * scale)
    put(dv, strides[5], row, group, s, S, e, E, dV)


def takes(q, k, v) -> bool:
    """Return whether the kernels can compute attention over these tensors on this machine."""
    return (
        triton is not None and max(q.shape[-1], v.shape[-1]) <= 256
        and all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v))
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )  # fmt: skip


def triton_attention(q, k, v, context: AttentionContext, scale: float):
    """Compute attention. q (B, H, T, D), k (B, G, S, D), v (B, G, S, E) -> (B, H, T, E).

    A query that sees no key has the output 0 and no gradient.
    """
    kind, rules = q.device.type, context.rules
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
    if rules is None:
        rules = Rules(*(torch.arange(x.shape[2], device=q.device)[None] for x in (q, k)), context.is_causal)
    return FlashAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), rules, scale)


class FlashAttention(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(ctx, q, k, v, rules, scale):
        """Save the inputs, the output and the LSE, and no scores."""
        B, H, T, _ = q.shape
        out = q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)  # the layout that `o_proj` reads
        lse = q.new_empty(B, H, T, dtype=torch.float32)
        ctx.rules, ctx.scale = rules, scale
        launch(forward_kernel, (q, k, v, out), (lse,), (), rules, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """(B, H, T, E) -> gradients of q, k, v."""
        q, k, v, out, lse = ctx.saved_tensors
        delta = (grad.float() * out).sum(-1)  # (B, H, T), D of the formula
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        launch(query_kernel, (q, k, v, grad), (lse, delta), (dq,), ctx.rules, ctx.scale)
        launch(key_kernel, (q, k, v, grad), (lse, delta), (dk, dv), ctx.rules, ctx.scale)
        return dq, dk, dv, None, None


def launch(kernel, tensors, numbers, results, rules, scale):
    """Run a kernel, one program per tile of queries (of keys in `key_kernel`), head and row."""
    q, k, v = tensors[:3]
    (B, H, T, D), (_, G, S, E) = q.shape, v.shape
    widths = [max(16, triton.next_power_of_2(width)) for width in (D, E)]  # 16: the least of `tl.dot`
    tile = min(TILE, 2**14 // (max(widths) * q.element_size()))  # 16 KiB of queries or keys
    one, other, heads = (S, T, G) if kernel is key_kernel else (T, S, H)
    tiles = max(64, triton.next_power_of_2(triton.cdiv(other, tile)))  # trap: each value is compiled anew
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"  # of fp32 inputs
    kernel[(triton.cdiv(one, tile), heads, B)](
        *tensors, *numbers, *results, plan(rules, B, tile), tuple(x.stride() for x in (*tensors, *results)),
        scale, T, S, H // G, D, E, *widths, tile, tiles, precision,
    )  # fmt: skip


def lesson():
    """Print"""


if __name__ == "__main__":
    lesson()
