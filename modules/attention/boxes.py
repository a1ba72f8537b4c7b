"""The rules of attention as boxes, from which a kernel tells which queries and keys, and which tiles, can meet.

All rules of modules/attention/context.py become one. Every query and every key is a box, an interval of
indices times an interval of documents, and a query sees a key if their boxes overlap:

    query      max(0, q - W + 1) .. q   x   document .. document     padding: everything
    key                        k .. k   x   document .. document     of a prefix: everything; not real: k = -1

The box around all boxes of a tile tells which tiles can meet at all; a kernel skips the others: the future,
what lies before the window, other documents. Tiles that can meet may still hide some keys, or even all.

    low, high, first, last: (B, 4, N) int32     N queries, keys, or tiles of them
"""

import torch

from modules.attention.context import Rules, build_context

FAR = 2**31 - 2  # beyond every index and document, in 32 bits


def plan(rules: Rules, rows: int, size: int):
    """Return the boxes of queries and keys, (B, 4, T) and (B, 4, S), and those around each `size` of them.

    All layers of a forward share them.
    """
    if rules.plan is None or rules.plan[0] != (rows, size):
        q, k, window = rules.query_index, rules.key_index, rules.window
        low = torch.zeros_like(q) if window is None else (q - window + 1).clamp(min=0)
        high = q if rules.causal else torch.full_like(q, FAR) if window is None else q + window - 1
        padding = torch.zeros_like(q).bool() if rules.real_queries is None else ~rules.real_queries
        prefix = (k >= 0) & (k < rules.prefix)
        if rules.real_keys is not None:
            k = torch.where(rules.real_keys, k, -1)
        documents = rules.query_documents, rules.key_documents
        documents = [torch.zeros_like(x) if y is None else y for x, y in zip((q, k), documents, strict=True)]
        pair = boxes(low, high, documents[0], padding), boxes(k, k, documents[1], prefix)
        pair = [x.expand(rows, -1, -1).contiguous() for x in pair]
        rules.plan = (rows, size), (*pair, *(around(x, size) for x in pair))
    return rules.plan[1]


def boxes(low, high, document, unlimited):
    """Stack the boxes of all queries or keys, each side (B or 1, N), to (B or 1, 4, N)."""
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


def meet(a, b):
    """Return whether each box of a overlaps each of b: (B, 4, N), (B, 4, M) -> (B, N, M)."""
    (low, high, first, last), others = a[..., None].unbind(1), b[:, :, None].unbind(1)
    indices = (low <= others[1]) & (others[0] <= high)
    return indices & (first <= others[3]) & (others[2] <= last)


def lesson():
    """Print which tiles of a row can meet, for several rules."""
