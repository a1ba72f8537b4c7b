"""Flash attention, written out: softmax by tiles of keys, so that memory grows with T, not with its square.

The softmax of a row of scores needs the maximum m and the sum l over all keys. Both can be carried from one
tile of keys to the next, and what was summed under an old maximum is scaled down ("online softmax"):

    S = scale * Q K^T, one tile      m' = max(m, rowmax S)      P = exp(S - m')      a = exp(m - m')
    l <- a l + rowsum P              O <- a O + P V             at the end  O / l    LSE = m + ln l

The backward pass computes each tile of P again, from Q, K and the LSE (log-sum-exp) of its row. With the
gradients dO of the output and dL of the LSE:

    P = exp(S - LSE)      D = rowsum(dO * O) - dL      dS = P * (dO V^T - D)
    dV = P^T dO           dQ = scale * dS K            dK = scale * dS^T Q

    q: (B, H, T, D)   k: (B, G, S, D)   v: (B, G, S, Dv)   ->   out: (B, H, T, Dv)   LSE: (B, H, T)

Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691.
Traps: a row without a key yet has m = -inf, and exp(-inf - -inf) is NaN: m starts at the lowest finite
number. Dropout acts on P in O but not in l; D = rowsum(dO * O) then holds for the O with dropout. In bf16 the
softmax and all sums over tiles are fp32.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from modules.attention.context import AttentionContext, Rules, build_context

QUERIES, KEYS = 128, 128  # of a tile: the scores of 8 heads are 512 KiB in fp32, which a cache holds
FAR = 2**62  # beyond every index


def flash_attention(q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """Compute what `eager_attention` does. q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D of v)."""
    rules = context.rules
    if rules is None:
        rules = Rules(*(torch.arange(x.shape[2], device=x.device)[None] for x in (q, k)), context.is_causal)
    return flash_with_lse(q, k, v, rules, scale, dropout)[0]


def flash_with_lse(q, k, v, rules: Rules, scale: float, dropout: float = 0.0):
    """Return the output (B, H, T, Dv) and the LSE of each row of scores (B, H, T), both differentiable.

    Attention over keys in several places is the mean of the outputs, weighted by exp(LSE). A query that may
    see no key has the output 0 and the LSE -inf.
    """
    seed = int(torch.randint(FAR, ())) if dropout else 0  # from the global generator, which a run seeds
    return FlashAttention.apply(q, k, v, rules, scale, dropout, seed)


def spans(numbers, chosen, size: int):
    """Return the lowest and the highest chosen number of each block: (B or 1, N) -> 2 x (B or 1, N/size)."""
    numbers, rest = numbers.long(), (0, -numbers.shape[1] % size)
    low = F.pad(torch.where(chosen, numbers, FAR), rest, value=FAR).unflatten(1, (-1, size))
    high = F.pad(torch.where(chosen, numbers, -FAR), rest, value=-FAR).unflatten(1, (-1, size))
    return low.amin(-1), high.amax(-1)


def plan(rules: Rules):
    """Yield each block of queries with the tiles of keys that some of them may see: (slice, [slice, ..]).

    It follows `Rules.tile` rule by rule, but compares the lowest and highest index (and document) of blocks
    instead of indices, so tiles that are hidden from all queries cost nothing, not even their mask.
    """
    T, S = rules.query_index.shape[1], rules.key_index.shape[1]
    everyone = torch.ones_like(rules.query_index, dtype=torch.bool)
    real = everyone if rules.real_queries is None else rules.real_queries
    valid = (rules.key_index >= 0) & (True if rules.real_keys is None else rules.real_keys)
    first, last = (x[..., None] for x in spans(rules.query_index, real, QUERIES))  # (B or 1, T/QUERIES, 1)
    first_key, last_key = (x[:, None] for x in spans(rules.key_index, valid, KEYS))  # (B or 1, 1, S/KEYS)
    padding = torch.le(*spans(real, ~real, QUERIES))[..., None]  # one is in the block: it may see every key
    if rules.query_documents is not None:
        low, high = (x[..., None] for x in spans(rules.query_documents, real, QUERIES))
        low_key, high_key = (x[:, None] for x in spans(rules.key_documents, valid, KEYS))
    sink = False
    if rules.sinks is not None:
        sink = torch.le(*spans(rules.sinks, valid & rules.sinks, KEYS))[:, None]  # one is in the block
    for n, start in enumerate(range(0, T, QUERIES)):
        seen = first_key <= last_key  # (B or 1, 1, S/KEYS): there is a key
        if rules.causal:
            seen = seen & (first_key <= last[:, n : n + 1])
        if rules.window is not None:
            near = last_key > first[:, n : n + 1] - rules.window
            if not rules.causal:
                near = near & (first_key < last[:, n : n + 1] + rules.window)
            seen = seen & (near | sink)
        if rules.query_documents is not None:
            seen = seen & (low_key <= high[:, n : n + 1]) & (high_key >= low[:, n : n + 1])
        seen = seen | padding[:, n : n + 1] | (first_key < rules.prefix)
        tiles = [slice(i * KEYS, min(i * KEYS + KEYS, S)) for i in seen.any(0)[0].nonzero()[:, 0].tolist()]
        yield slice(start, min(start + QUERIES, T)), tiles


class FlashAttention(torch.autograd.Function):
    """The R = H/G query heads of a group are rows of one matrix, so products also sum dK and dV over them."""

    @staticmethod
    def forward(ctx, q, k, v, rules, scale, dropout, seed):
        """(B, H, T, D), (B, G, S, D), (B, G, S, Dv) -> (B, H, T, Dv), (B, H, T)."""
        B, H, T, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (N, S, D or Dv), N = B*G
        out = v.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)  # in memory as the output projection reads it
        lse = q.new_empty(B, H, T, dtype=wide)
        generator = torch.Generator(q.device).manual_seed(seed)
        for block, tiles in plan(rules):
            rows = stacked(q, k, block) * scale  # (N, R*n, D)
            top = rows.new_full((*rows.shape[:2], 1), torch.finfo(wide).min, dtype=wide)  # m
            total = torch.zeros_like(top)  # l
            mixed = top.new_zeros(*rows.shape[:2], v.shape[-1])  # O
            for tile in tiles:
                scores = tile_scores(rows, keys, rules, block, tile)  # (N, R*n, m)
                new = torch.maximum(top, scores.amax(-1, keepdim=True))
                probs, shrink, top = scores.sub_(new).exp_(), (top - new).exp_(), new
                total.mul_(shrink).add_(probs.sum(-1, keepdim=True))
                if dropout:
                    probs *= kept_weights(probs, dropout, generator)
                mixed.mul_(shrink).add_(torch.bmm(probs.to(v.dtype), values[:, tile]))
            out[:, :, block] = (mixed / total.masked_fill(total == 0, 1)).view(B, H, -1, v.shape[-1])
            lse[:, :, block] = (top + total.log()).view(B, H, -1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = rules, scale, dropout, seed
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        """(B, H, T, Dv), (B, H, T) -> gradients of q, k, v."""
        (q, k, v, out, lse), (rules, scale, dropout, seed) = ctx.saved_tensors, ctx.settings
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        lse = lse.masked_fill(lse == -torch.inf, 0)  # rows that see nothing: P = exp(-inf - 0) = 0
        grad_q = torch.empty_like(q)
        sum_k, sum_v = torch.zeros_like(keys, dtype=lse.dtype), torch.zeros_like(values, dtype=lse.dtype)
        generator = torch.Generator(q.device).manual_seed(seed)  # the same tiles in the same order
        for block, tiles in plan(rules):
            rows, grad_rows = stacked(q, k, block) * scale, stacked(grad, k, block)  # (N, R*n, D or Dv)
            level, delta = (stacked(x[..., None], k, block) for x in (lse, grad_lse))  # (N, R*n, 1)
            delta = (grad_rows.to(lse.dtype) * stacked(out, k, block)).sum(-1, keepdim=True) - delta
            sum_q = torch.zeros_like(rows, dtype=lse.dtype)
            for tile in tiles:
                probs = tile_scores(rows, keys, rules, block, tile).sub_(level).exp_()  # (N, R*n, m)
                grad_probs = torch.bmm(grad_rows, values[:, tile].mT).to(lse.dtype)
                dropped = probs
                if dropout:
                    kept = kept_weights(probs, dropout, generator)
                    dropped, grad_probs = probs * kept, grad_probs.mul_(kept)
                sum_v[:, tile] += torch.bmm(dropped.to(v.dtype).mT, grad_rows)
                grad_scores = grad_probs.sub_(delta).mul_(probs).to(q.dtype)
                sum_q += torch.bmm(grad_scores, keys[:, tile])
                sum_k[:, tile] += torch.bmm(grad_scores.mT, rows)  # the rows are scaled already
            grad_q[:, :, block] = sum_q.mul_(scale).view_as(grad_q[:, :, block])
        return grad_q, sum_k.to(k.dtype).view_as(k), sum_v.to(v.dtype).view_as(v), None, None, None, None


def stacked(x, k, block):
    """Return a block of queries, (B, H, T, D) -> (B*G, H/G*n, D)."""
    return x[:, :, block].reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def tile_scores(rows, keys, rules, block, tile):
    """Return the scores of a tile, in fp32 at least: (N, R*n, D), (N, S, D) -> (N, R*n, m)."""
    scores = torch.bmm(rows, keys[:, tile].mT)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    hidden = ~rules.tile(block, tile)  # (B or 1, n, m)
    if hidden.any():
        scores.view(len(hidden), -1, *hidden.shape[1:]).masked_fill_(hidden[:, None], -torch.inf)
    return scores


def kept_weights(probs, dropout, generator):
    """Draw which weights of a tile dropout keeps: 0 or 1 / (1 - dropout)."""
    return torch.empty_like(probs).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def lesson():
    """Print the softmax of one row, carried from tile to tile, and the bytes kept for the backward pass."""
    from modules.attention.grouped_query import attend

    scores, values = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 0.0]), torch.arange(6.0)
    print("online softmax: six scores in tiles of two; the values are 0 to 5")
    m, total, mixed = torch.tensor(-torch.inf), 0.0, 0.0
    for tile, value in zip(scores.split(2), values.split(2), strict=True):
        new = torch.maximum(m, tile.max())
        probs, a, m = (tile - new).exp(), (m - new).exp(), new
        total, mixed = a * total + probs.sum(), a * mixed + probs @ value
        print(f"  scores {tile.tolist()}: m {m:.0f}, a {a:.3f}, l {total:.3f}, O / l {mixed / total:.3f}")
    print(f"  at once {scores.softmax(0) @ values:.3f}; LSE {m + total.log():.3f}, {scores.logsumexp(0):.3f}")
    print("KiB kept for the backward pass, for 256, 512 and 1024 tokens, 4 heads of 16 in fp32")
    for name in ("eager", "blocked", "flash"):
        kept = [{}, {}, {}]  # address and bytes
        for T, seen in zip((256, 512, 1024), kept, strict=True):
            x = torch.randn(1, 4, T, 16, requires_grad=True)
            keep = lambda x, seen=seen: seen.update({x.data_ptr(): x.nbytes}) or x  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(keep, keep):
                attend(name, x, x, x, build_context(T, "cpu"), 0.25)
        print(f"  {name:8s}", *[f"{sum(seen.values()) // 1024:8,}" for seen in kept])


if __name__ == "__main__":
    lesson()
