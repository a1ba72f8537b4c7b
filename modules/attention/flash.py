"""Flash attention, written out: softmax over tiles of keys, so that memory grows with T and not with T squared.

The softmax of a row of scores needs the maximum m and the sum l over all keys. Both can be carried from one
tile of keys to the next, and what was summed under an old maximum is scaled down ("online softmax"):

    S = scale * Q K^T, one tile      m' = max(m, rowmax S)      P = exp(S - m')      a = exp(m - m')
    l <- a l + rowsum P              O <- a O + P V             at the end  O / l    LSE = m + ln l

The backward pass computes each tile of P again, from Q, K and the LSE (log-sum-exp) of its row. With the
gradients dO of the output and dL of the LSE:

    P = exp(S - LSE)      D = rowsum(dO * O) - dL      dS = P * (dO V^T - D)
    dV = P^T dO           dQ = scale * dS K            dK = scale * dS^T Q

    q: (B, H, T, D)   k: (B, G, S, D)   v: (B, G, S, Dv)   ->   out: (B, H, T, Dv)   LSE: (B, H, T)

Tiles in which no query may see any key are skipped. Which ones follows from the lowest and highest index of
each block of queries and keys (and from their documents), without the mask of the tile.

Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691.
Traps: a row with no key yet has m = -inf and exp(-inf - -inf) is NaN, so m starts at the lowest finite number.
Dropout acts on P in O but not in l; D = rowsum(dO * O) then holds for the output with dropout. In bf16,
everything that is summed over tiles, and the softmax itself, is fp32.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from modules.attention.context import AttentionContext, Rules, build_context

QUERIES, KEYS = 128, 128  # of a tile; measured on a CPU, where its scores should fit into the cache
FAR = 2**62  # beyond every index


def flash_attention(q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """Compute what `eager_attention` does, by tiles. q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D)."""
    rules = context.rules
    if rules is None:
        rules = Rules(*(torch.arange(x.shape[2], device=x.device)[None] for x in (q, k)), context.is_causal)
    return flash_with_lse(q, k, v, rules, scale, dropout)[0]


def flash_with_lse(q, k, v, rules: Rules, scale: float, dropout: float = 0.0):
    """Return the output (B, H, T, Dv) and the LSE of each row of scores (B, H, T), both differentiable.

    Attention over keys in two places is the mean of both outputs, weighted by exp(LSE). A query that may see
    no key has the output 0 and the LSE -inf.
    """
    seed = int(torch.randint(FAR, ())) if dropout else 0  # from the global generator, which a run seeds
    return FlashAttention.apply(q, k, v, rules, scale, dropout, seed)


def blocks(x, size: int, fill):
    """Cut (B or 1, N) into blocks, (B or 1, N/size, size); the last one is filled up."""
    return F.pad(x, (0, -x.shape[1] % size), value=fill).unflatten(1, (-1, size))


def spans(numbers, chosen, size: int):
    """Return the lowest and the highest chosen number of each block, 2 x (B or 1, N/size)."""
    low, high = (torch.where(chosen, numbers.long(), fill) for fill in (FAR, -FAR))
    return blocks(low, size, FAR).amin(-1), blocks(high, size, -FAR).amax(-1)


def plan(rules: Rules):
    """Yield each block of queries with the tiles of keys it needs: (slice, [(slice, mask is needed), ..]).

    A tile is left out if no query may see any of its keys; it needs no mask if all may see all. `some` and
    `every` follow the rules of `Rules.tile`, one by one, for a block instead of a query.
    """
    T, S = rules.query_index.shape[1], rules.key_index.shape[1]
    real = rules.query_index >= 0 if rules.real_queries is None else rules.real_queries
    valid = rules.key_index >= 0
    if rules.real_keys is not None:
        valid = valid & rules.real_keys
    complete, padding = blocks(valid, KEYS, True).all(-1), blocks(~real, QUERIES, False).any(-1)
    first_key, last_key = spans(rules.key_index, valid, KEYS)  # (B or 1, blocks of keys)
    first, last = spans(rules.query_index, real, QUERIES)  # (B or 1, blocks of queries)
    if rules.query_documents is not None:
        lowest, highest = spans(rules.query_documents, real, QUERIES)
        first_document, last_document = spans(rules.key_documents, valid, KEYS)
    for block, start in enumerate(range(0, T, QUERIES)):
        low, high = first[:, block, None], last[:, block, None]
        some, every = last_key >= first_key, complete
        if rules.causal:
            some, every = some & (first_key <= high), every & (last_key <= low)
        if rules.window is not None:
            some = some & (last_key > low - rules.window)
            every = every & (first_key > high - rules.window)
            if not rules.causal:
                some = some & (first_key < high + rules.window)
                every = every & (last_key < low + rules.window)
        if rules.query_documents is not None:
            low, high = lowest[:, block, None], highest[:, block, None]
            some = some & (first_document <= high) & (last_document >= low)
            every = every & (torch.maximum(last_document, high) == torch.minimum(first_document, low))
        if rules.prefix:
            some, every = some | (first_key < rules.prefix), every | (complete & (last_key < rules.prefix))
        some = (some | padding[:, block, None]).any(0).tolist()
        every = every.expand(-1, len(some)).all(0).tolist()
        tiles = [(slice(n * KEYS, min(n * KEYS + KEYS, S)), not every[n]) for n, one in enumerate(some) if one]
        yield slice(start, min(start + QUERIES, T)), tiles


class FlashAttention(torch.autograd.Function):
    """The R = H/G query heads of a group are stacked as rows of one matrix, as in `eager_attention`."""

    @staticmethod
    def forward(ctx, q, k, v, rules, scale, dropout, seed):
        """(B, H, T, D), (B, G, S, D), (B, G, S, Dv) -> (B, H, T, Dv), (B, H, T)."""
        B, H, T, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (N, S, D), N = B*G
        out = v.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)  # in memory as the output projection reads it
        lse = q.new_empty(B, H, T, dtype=wide)
        generator = torch.Generator(q.device).manual_seed(seed)
        for block, tiles in plan(rules):
            rows = stacked(q, k, block) * scale  # (N, R*n, D)
            top = rows.new_full((*rows.shape[:2], 1), torch.finfo(wide).min, dtype=wide)  # m
            total = torch.zeros_like(top)  # l
            mixed = rows.new_zeros(*rows.shape[:2], v.shape[-1], dtype=wide)  # O
            for tile, masked in tiles:
                scores = tile_scores(rows, keys, rules, block, tile, masked, B)  # (N, R*n, m)
                new = torch.maximum(top, scores.amax(-1, keepdim=True))
                probs, shrink, top = scores.sub_(new).exp_(), (top - new).exp_(), new
                total.mul_(shrink).add_(probs.sum(-1, keepdim=True))
                if dropout:
                    probs *= kept_weights(probs, dropout, generator)
                mixed.mul_(shrink).add_(torch.bmm(probs.to(v.dtype), values[:, tile]))
            out[:, :, block] = (mixed / total.masked_fill(total == 0, 1)).view(B, H, -1, v.shape[-1])
            lse[:, :, block] = (top + total.log()).view(B, H, -1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rules, ctx.scale, ctx.dropout, ctx.seed = rules, scale, dropout, seed
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        """(B, H, T, Dv), (B, H, T) -> gradients of q, k, v."""
        q, k, v, out, lse = ctx.saved_tensors
        B, H, T, D = q.shape
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        lse = lse.masked_fill(lse == -torch.inf, 0)  # rows that see nothing: P = exp(-inf - 0) = 0
        grad_q = torch.empty_like(q)
        sum_k, sum_v = torch.zeros_like(keys, dtype=lse.dtype), torch.zeros_like(values, dtype=lse.dtype)
        generator = torch.Generator(q.device).manual_seed(ctx.seed)  # the same tiles in the same order
        for block, tiles in plan(ctx.rules):
            rows, grad_rows = stacked(q, k, block) * ctx.scale, stacked(grad, k, block)  # (N, R*n, D or Dv)
            level = stacked(lse[..., None], k, block)  # (N, R*n, 1)
            delta = (grad_rows.to(lse.dtype) * stacked(out, k, block)).sum(-1, keepdim=True)
            delta -= stacked(grad_lse[..., None], k, block)
            sum_q = torch.zeros_like(rows, dtype=lse.dtype)
            for tile, masked in tiles:
                scores = tile_scores(rows, keys, ctx.rules, block, tile, masked, B)  # (N, R*n, m)
                probs = scores.sub_(level).exp_()
                grad_probs = torch.bmm(grad_rows, values[:, tile].mT).to(lse.dtype)
                dropped = probs
                if ctx.dropout:
                    kept = kept_weights(probs, ctx.dropout, generator)
                    dropped, grad_probs = probs * kept, grad_probs.mul_(kept)
                sum_v[:, tile] += torch.bmm(dropped.to(v.dtype).mT, grad_rows)
                grad_scores = grad_probs.sub_(delta).mul_(probs).to(q.dtype)
                sum_q += torch.bmm(grad_scores, keys[:, tile])
                sum_k[:, tile] += torch.bmm(grad_scores.mT, rows)  # the rows are scaled already
            grad_q[:, :, block] = sum_q.mul_(ctx.scale).view(B, H, -1, D)
        return grad_q, sum_k.to(k.dtype).view_as(k), sum_v.to(v.dtype).view_as(v), None, None, None, None


def stacked(x, k, block):
    """Return a block of queries, (B, H, T, D) -> (B*G, H/G*n, D)."""
    return x[:, :, block].reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def tile_scores(rows, keys, rules, block, tile, masked, batch):
    """Return the scores of a tile, in fp32 at least: (N, R*n, D), (N, S, D) -> (N, R*n, m)."""
    scores = torch.bmm(rows, keys[:, tile].mT)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if masked:
        hidden = ~rules.tile(block, tile)  # (B or 1, n, m)
        scores.view(batch, -1, *hidden.shape[1:]).masked_fill_(hidden[:, None], -torch.inf)
    return scores


def kept_weights(probs, dropout, generator):
    """Draw which weights of a tile dropout keeps: 0 or 1 / (1 - dropout)."""
    return torch.empty_like(probs).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def lesson():
    """Print the softmax of one row, carried from tile to tile, and the bytes kept for the backward pass."""
    from modules.attention.blocked import blocked_attention
    from modules.attention.grouped_query import eager_attention

    scores, values = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 0.0]), torch.arange(6.0)
    print("online softmax: six scores in tiles of two, the values are 0 to 5")
    top, total, mixed = -torch.inf, 0.0, 0.0
    for tile, value in zip(scores.split(2), values.split(2), strict=True):
        new = max(top, tile.max().item())
        probs, shrink = (tile - new).exp(), math.exp(top - new)
        total, mixed, top = shrink * total + probs.sum(), shrink * mixed + probs @ value, new
        print(f"  scores {tile.tolist()}: maximum {top:.0f}, what was there shrinks by {shrink:.3f}, "
              f"sum {total:.3f}, output {mixed / total:.3f}")  # fmt: skip
    print(f"  softmax over all six: {scores.softmax(0) @ values:.3f}, LSE {scores.logsumexp(0):.3f} = "
          f"{top + total.log():.3f}")  # fmt: skip
    print("kept for the backward pass, 4 heads of 16 in fp32, in KiB:   eager   blocked   flash")
    for T in (256, 512, 1024):
        q, k, v, kept = *torch.randn(3, 1, 4, T, 16).requires_grad_().unbind(), []
        context = build_context(T, "cpu")
        for path in (eager_attention, lambda q, k, v, _, scale: blocked_attention(q, k, v, scale), flash_attention):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
                sizes = []
                path(q, k, v, context, 0.25)
            kept.append(sum(sizes) // 1024)
        print(f"  {T:5d} tokens {kept[0]:45,} {kept[1]:9,} {kept[2]:7,}")


if __name__ == "__main__":
    lesson()
