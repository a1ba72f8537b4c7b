"""The Triton kernels of flash_triton.py: flash attention on GPUs, forward and backward.

A program takes one tile of queries and walks over tiles of keys; scores exist for one tile at a time, in
registers. With S = scale * Q K^T, P = softmax(S), O = P V (Dao et al., arXiv 2205.14135, 2307.08691):

    forward    m' = max(m, rowmax S)   P = exp(S - m')   a = exp(m - m')   l = a l + rowsum P   O = a O + P V
               at the end  O = O / l,  LSE = m + ln l
    backward   P = exp(S - LSE)        dP = dO V^T       D = rowsum(dO * O)         dS = P * (dP - D)
               dQ = scale * dS K       dK = scale * dS^T Q       dV = P^T dO        (summed over the group)

    q, dQ: (B, H, T, D)   k, dK: (B, G, S, D)   v, dV: (B, G, S, E)   O, dO: (B, H, T, E)
    lse, delta (D of the formula): (B, H, T)    plan: queries, keys, tiles of queries, tiles of keys

Every query and key is a box (flash_triton.py), and they see each other if their boxes overlap. Sums are fp32,
whatever the inputs, and no two programs add to one number, so results are the same every time.

Traps: TRITON_INTERPRET=1, which runs kernels in NumPy, is read where a kernel is decorated, and for Triton's
own functions when it is imported: set it before Python starts. It cannot multiply bf16.
"""

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # PyTorch for CUDA brings it along; elsewhere the kernels can only be read
    triton, constexpr = None, int

    def jit(kernel=None, **options):
        """Leave a kernel as it is."""
        return kernel or jit


FAR = 2**31 - 2  # beyond every index and document, in 32 bits
NOWHERE = constexpr(FAR + 1)  # from here to its negative is an empty box; kernels only read constant globals


@jit
def fetch(x, strides, row, head, i, size, d, width):
    """Load x[row, head, i, d] for vectors i and d; zeros outside. Trap: large offsets exceed 32 bits."""
    x += row * strides[0] + head * strides[1]
    at = x + i.to(tl.int64)[:, None] * strides[2] + d[None] * strides[3]
    return tl.load(at, (i < size)[:, None] & (d < width)[None], 0.0)


@jit
def put(x, strides, row, head, i, size, d, width, value):
    """Store what `fetch` loads."""
    x += row * strides[0] + head * strides[1]
    at = x + i.to(tl.int64)[:, None] * strides[2] + d[None] * strides[3]
    tl.store(at, value, (i < size)[:, None] & (d < width)[None])


@jit
def box(boxes, row, i, size):
    """Load the boxes i of (B, 4, size): low, high, first, last. Those beyond the end are empty."""
    at, inside = boxes + row * 4 * size + i, i < size
    low, high = tl.load(at, inside, NOWHERE), tl.load(at + size, inside, -NOWHERE)
    return low, high, tl.load(at + 2 * size, inside, NOWHERE), tl.load(at + 3 * size, inside, -NOWHERE)


@jit
def meet(a, b):
    """Return whether each box of a overlaps each of b: (N), (M) -> (N, M)."""
    indices = (a[0][:, None] <= b[1][None]) & (b[0][None] <= a[1][:, None])
    return indices & (a[2][:, None] <= b[3][None]) & (b[2][None] <= a[3][:, None])


@jit
def span(own, others, row, size, TILES: constexpr):
    """Return the first of the other tiles that can meet this program's own, and the one after the last."""
    tile = tl.arange(0, TILES)
    mine = box(own, row, tl.program_id(0) + tl.arange(0, 1), tl.num_programs(0))
    near = meet(mine, box(others, row, tile, size))  # (1, TILES)
    return tl.min(tl.where(near, tile[None], size)), tl.max(tl.where(near, tile[None] + 1, 0))


@jit(do_not_specialize=["T", "S"])  # trap: otherwise some lengths are compiled anew
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
        K = fetch(k, strides[1], row, head // R, s, S, d, D)  # query heads h of a group share keys h // R
        V = fetch(v, strides[2], row, head // R, s, S, e, E)
        x = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * scale
        x = tl.where(meet(queries, box(plan[1], row, s, S)), x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # trap: before the first key, -inf - -inf is NaN
        P, a = tl.exp(x - safe[:, None]), tl.exp(m - safe)
        l = l * a + tl.sum(P, 1)
        O = O * a[:, None] + tl.dot(P.to(V.dtype), V, input_precision=PRECISION)
        m = top
    some = tl.where(l > 0, l, 1.0)  # a query that sees nothing: O = 0, and LSE = inf, for P = 0 in backward
    put(out, strides[3], row, head, t, T, e, E, O / some[:, None])
    at = (row * tl.num_programs(1) + head) * T + t
    tl.store(lse + at, tl.where(l > 0, m + tl.log(some), float("inf")), t < T)


@jit(do_not_specialize=["T", "S"])
def query_kernel(
    q, k, v, grad, lse, delta, dq, plan, strides, scale, T, S, R, D: constexpr, E: constexpr,
    WIDTH: constexpr, WIDTH_V: constexpr, TILE: constexpr, TILES: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Compute dQ of one tile of queries of one head."""
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
    """Compute dK and dV of one tile of keys, summed over the R query heads of its group.

    Scores are transposed, rows are keys: P^T and dS^T are then factors as they are.
    """
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


def sizes(D: int, E: int, bytes_per_number: int):
    """Return D and E as powers of two (16 is the least for `tl.dot`), and the queries or keys of a tile."""
    widths = [max(16, 1 << (width - 1).bit_length()) for width in (D, E)]
    numbers = 2**13 if bytes_per_number == 2 else 2**11  # more of them do not fit into registers
    return *widths, max(16, min(64, numbers // max(widths)))


def lesson():
    """Print the tiles of each head dimension, and a softmax computed by tiles as the kernel does."""
    import torch

    print("tiles of the kernels: queries or keys x channels (padded to a power of two)")
    for D in (24, 64, 80, 128, 256):
        shapes = [f"{tile:2d} x {width:3d}" for width, _, tile in (sizes(D, D, 2), sizes(D, D, 4))]
        print(f"  head dimension {D:3d}: bf16, fp16 {shapes[0]}   fp32 {shapes[1]}")
    x, v, m, l, out = torch.tensor([1.0, 5.0, 2.0, 7.0]), torch.arange(4.0), torch.tensor(-1e9), 0.0, 0.0
    for start in (0, 2):
        tile, top = x[start : start + 2], torch.maximum(m, x[start : start + 2].max())
        P, a, m = (tile - top).exp(), (m - top).exp(), top
        l, out = l * a + P.sum(), out * a + P @ v[start : start + 2]
        print(f"  after {start + 2} keys: m = {m:.0f}, l = {l:.4f}, O / l = {out / l:.4f}")
    print(f"  all keys at once: {x.softmax(0) @ v:.4f}")


if __name__ == "__main__":
    lesson()
