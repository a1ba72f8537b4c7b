"""Flash attention for GPUs by the Triton kernels of flash_kernels.py: masks and shared keys in linear memory.

PyTorch has no such kernel: with a mask it repeats shared keys for all query heads, and stores the mask. Here
all rules of modules/attention/context.py become one. Every query and every key is a box, an interval of
indices times an interval of documents, and a query sees a key if their boxes overlap:

    query      max(0, q - W + 1) .. q   x   document .. document     padding: everything
    key                        k .. k   x   document .. document     prefix: everything; not real: FAR .. -1
                                                                     sink: k .. FAR, where no window ends

The box around all boxes of a tile tells which tiles can meet at all. A program starts at the first and stops
after the last tile that its own can meet: it skips the future, what lies before the window, and other
documents.

    q: (B, H, T, D)   k: (B, G, S, D)   v: (B, G, S, E)   ->   (B, H, T, E)
    boxes: (B, 4, N) int32, low, high, first, last of N queries, keys, or tiles

Traps: `torch.compile` would look into a plain autograd function, and cannot follow this one; an operator it
calls as it is. Contexts are shared by all layers, so boxes are made once per forward and kept with the rules.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from modules.attention.context import AttentionContext, Rules, build_context
from modules.attention.flash_kernels import FAR, forward_kernel, key_kernel, query_kernel, sizes, triton


def takes(q, k, v) -> bool:
    """Return whether the kernels can compute attention over these tensors on this GPU."""
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
    q, k, v = (x.to(dtype) for x in (q, k, v))
    *_, tile = sizes(q.shape[3], v.shape[3], q.element_size())
    return flash_forward(q, k, v, plan(rules, len(q), tile), scale)[0]


def plan(rules: Rules, rows: int, size: int):
    """Return the boxes of all queries and keys, and those around each `size` of them: a list of four."""
    if rules.plan is None or rules.plan[0] != (rows, size):
        q, k, window = rules.query_index, rules.key_index, rules.window
        low = torch.zeros_like(q) if window is None else (q - window + 1).clamp(min=0)
        high = q if rules.causal else torch.full_like(q, FAR) if window is None else q + window - 1
        padding = torch.zeros_like(q).bool() if rules.real_queries is None else ~rules.real_queries
        real = k >= 0 if rules.real_keys is None else (k >= 0) & rules.real_keys
        begin, end = k, k
        if rules.sinks is not None:
            end = torch.where(rules.sinks, FAR, k)
            begin = k if rules.causal else torch.where(rules.sinks, -FAR, k)
        ends = torch.where(real, begin, FAR), torch.where(real, end, -1)
        documents = rules.query_documents, rules.key_documents
        documents = [torch.zeros_like(x) if y is None else y for x, y in zip((q, k), documents, strict=True)]
        pair = boxes(low, high, documents[0], padding), boxes(*ends, documents[1], real & (k < rules.prefix))
        pair = [x.expand(rows, -1, -1).contiguous() for x in pair]
        rules.plan = (rows, size), [*pair, *(around(x, size) for x in pair)]
    return rules.plan[1]


def boxes(low, high, document, unlimited):
    """Stack the sides of boxes, each (B or 1, N), to (B or 1, 4, N)."""
    sides = zip((low, high, document, document), (-FAR, FAR, -FAR, FAR), strict=True)
    sides = torch.broadcast_tensors(*(torch.where(unlimited, far, side) for side, far in sides))
    return torch.stack(sides, 1).int()


def around(boxes, size: int):
    """Return the smallest box around each `size` boxes in a row: (B, 4, N) -> (B, 4, tiles)."""
    number = boxes.shape[2]
    places = torch.arange(-(-number // size) * size, device=boxes.device).clamp(max=number - 1)
    tiles = boxes[..., places].unflatten(2, (-1, size))
    low, high = tiles.amin(-1), tiles.amax(-1)
    return torch.stack([low[:, 0], high[:, 1], low[:, 2], high[:, 3]], 1)


@custom_op("tinyseek::flash_forward", mutates_args=())
def flash_forward(q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Return O and the LSE."""
    out, lse = outputs(q, k, v, plan, scale)
    launch(forward_kernel, (q, k, v, out), (lse,), (), plan, scale)
    return out, lse


@flash_forward.register_fake
def outputs(q, k, v, plan, scale):
    """Allocate O, in the layout that the next layer reads, and the LSE."""
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v.shape[3]).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


@custom_op("tinyseek::flash_backward", mutates_args=())
def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: list[Tensor], grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV from dO."""
    delta = (grad.float() * out).sum(-1)  # (B, H, T), D of the formula
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    launch(query_kernel, (q, k, v, grad), (lse, delta), (dq,), plan, scale)
    launch(key_kernel, (q, k, v, grad), (lse, delta), (dk, dv), plan, scale)
    return dq, dk, dv


flash_backward.register_fake(lambda q, k, v, *rest: tuple(torch.empty_like(x) for x in (q, k, v)))


def keep(ctx, inputs, output):
    """Keep inputs, O and LSE for the backward pass, and no scores."""
    *tensors, plan, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, *plan)


def backward(ctx, grad, _):
    """(B, H, T, E) -> gradients of q, k, v."""
    q, k, v, out, lse, *plan = ctx.saved_tensors  # trap: under checkpointing they can be read once
    return *flash_backward(q, k, v, out, lse, plan, grad, ctx.scale), [None] * 4, None


flash_forward.register_autograd(backward, setup_context=keep)


def launch(kernel, tensors, numbers, results, plan, scale):
    """Run a kernel: one program per tile of queries (of keys in `key_kernel`), head and row."""
    q, k, v = tensors[:3]
    (B, H, T, D), (_, G, S, E) = q.shape, v.shape
    *widths, tile = sizes(D, E, q.element_size())
    own, other, heads = (S, T, G) if kernel is key_kernel else (T, S, H)
    tiles = max(64, triton.next_power_of_2(triton.cdiv(other, tile)))  # trap: each value is compiled anew
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"  # of fp32 inputs
    strides = tuple(x.stride() for x in (*tensors, *results))
    kernel[(triton.cdiv(own, tile), heads, B)](
        *tensors, *numbers, *results, tuple(plan), strides, scale, T, S, H // G, D, E, *widths, tile, tiles,
        precision, num_warps=8 if max(widths) > 64 else 4, num_stages=2,
    )  # fmt: skip


def lesson():
    """Print which tiles can meet under several rules; where the kernels can run, compare with the formula."""
    print("of 64 tokens, tiles of 8 queries (rows) and 8 keys (columns) that can meet")
    tokens, pictures = torch.arange(64)[None], []
    for options in ({"window": 12}, {"document_ids": (tokens > 20).int()}, {"padding_mask": tokens < 50}):
        *_, queries, keys = plan(build_context(64, "cpu", **options).rules, 1, 8)
        a, b = queries[0, :, :, None], keys[0, :, None]
        near = (a[0] <= b[1]) & (b[0] <= a[1]) & (a[2] <= b[3]) & (b[2] <= a[3])
        pictures.append(["".join(".#"[cell] for cell in row) for row in near.tolist()])
    print("  window of 12  2 documents   14 padding")
    for row in zip(*pictures, strict=True):
        print("  " + "      ".join(row))
    if triton is None or not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        print("the kernels need a GPU, or the package triton and TRITON_INTERPRET=1: not run here")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, heads, 100, 32, device=device) for heads in (2, 1, 1))
    context = build_context(100, device, window=30)
    scores = (q @ k.mT * 0.2).masked_fill(~context.mask, -torch.inf)
    gap = triton_attention(q, k, v, context, 0.2) - scores.softmax(-1) @ v
    print(f"largest difference from the formula, 100 tokens, window of 30: {gap.abs().max():.0e}")


if __name__ == "__main__":
    lesson()
