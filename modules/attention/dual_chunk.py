"""Dual chunk attention (DCA): read far beyond the trained length, at distances that were all trained.

A row is cut into chunks of s tokens, and every key is rotated by its place in its chunk. A query uses one of
three positions, depending on d, the number of chunks between it and the key:

    key at j                                 j mod s
    query at i   d = 0   intra-chunk         i mod s
                 d = 1   successive chunks   min(i mod s + s, c)
                 d > 1   inter-chunk         min(2s - 1, c), the same for every query

RoPE sees the difference of the two, from 0 to c however long the text is. It is exact (i - j) within a chunk,
and for the nearest w + 1 tokens if w < s; elsewhere it may be too small. A text of at most s tokens is one
chunk: attention as usual. Nothing needs training. The frequencies may be stretched as well, as by YaRN.

    c  chunk_size   the largest distance       Qwen2.5-1M: 262144     the authors: 3/4 of the trained length
    w  local_size   tokens at exact distance               8192                    1/8
    s  = c - w      tokens in a chunk

Two paths compute the same. `by_chunks` is for whole rows: for some queries of a chunk at a time it runs three
attentions over three ranges of keys, each with the logarithm of its denominator (LSE), and merges them with
softmax(LSE) as weights. `at_once` is for packed documents and ragged rows: it selects each score from three.

An, Huang, et al., arXiv 2402.17463; Qwen2.5-1M, arXiv 2501.15383. The paper's text limits positions to c - 1;
here it is c, as in the authors' and in Qwen's code.
Traps: `chunk_size` is not the size of a chunk. exp(LSE) overflows unless the largest LSE is subtracted first.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from config.model import ModelConfig
from modules.attention.context import AttentionContext, build_context
from modules.attention.grouped_query import GroupedQueryAttention, average, scores_of, weighted_sum
from modules.rope import RotaryEmbedding, apply_rotary
from utils.errors import UserError

BLOCK = 128  # queries at a time at most, so that scores take BLOCK * S numbers per head


def three_positions(positions, c: int, s: int):
    """Return the positions of queries, intra, successive and inter, each shaped as `positions`."""
    place = positions % s
    return place, (place + s).clamp(max=c), torch.full_like(place, min(2 * s - 1, c))


@dataclass
class ChunkTables:
    """The rotary tables of one forward, which all layers share."""

    stride: int  # s
    chunks: torch.Tensor  # (B or 1, T), the chunk of each new token
    tables: list[tuple]  # (cos, sin), each (B or 1, T, R), for d = 0 (and for keys), 1, and 2 or more
    temperature: torch.Tensor | None  # (B or 1, 1, T, 1), a factor on queries
    masks: list[torch.Tensor] | None = None  # the same for all layers, so computed once, by `further`

    def further(self, key_positions):
        """Return the masks d >= 1 and d >= 2, each (B or 1, 1, T, S) bool, if there are such keys."""
        if self.masks is None:
            d = (self.chunks[:, :, None] - (key_positions // self.stride)[:, None, :])[:, None]
            self.masks = [d >= least for least in range(1, min(int(d.max()), 2) + 1)]
        return self.masks


class DualChunkRotary(nn.Module):
    """The tables for dual chunk attention, from a `RotaryEmbedding`, in whose place it stands.

    Args:
        rotary: the embedding, with its frequencies and factors.
        chunks: chunk_size, local_size, and original_max_position_embeddings or None. The last is the length L
            of Qwen's temperature: the scores of the n-th token, n > L, are multiplied by m^2, with m =
            0.1 ln(n / L) + 1. Qwen's servers put the length of the whole text in place of n; here the past
            does not depend on the future, so cached and uncached agree.
    """

    def __init__(self, rotary: RotaryEmbedding, chunks: dict):
        super().__init__()
        if rotary.depends_on_length:
            raise UserError(
                "model.dual_chunk_attention_config needs a rule in model.rope_scaling that ignores the length"
            )
        c, w = chunks["chunk_size"], chunks["local_size"]
        self.rotary, self.c, self.s = rotary, c, c - w
        self.trained = chunks.get("original_max_position_embeddings")

    @torch.no_grad()
    def forward(self, positions, lengths=None):
        """positions (B or 1, T) int -> `ChunkTables`; `lengths`, for rules that need them, is not read."""
        tables = [self.rotary(places) for places in three_positions(positions, self.c, self.s)]
        temperature = None
        if self.trained is not None:
            ratio = (positions + 1).to(tables[0][0].dtype) / self.trained
            temperature = (0.1 * ratio.log() + 1).clamp(min=1).square()[:, None, :, None]
        return ChunkTables(self.s, positions // self.s, tables, temperature)


class DualChunkAttention(GroupedQueryAttention):
    """Grouped-query attention at dual chunk positions: `forward(x, context, rotary, cache)`.

    A cache holds rotated keys: their place in their chunk never changes. With `attn_implementation` "eager",
    all goes through `at_once`.
    """

    def forward(self, x, context: AttentionContext, rotary: ChunkTables, cache=None):
        """x (B, T, C) -> (B, T, C); cache: a `KVCache` or None."""
        B, T, _ = x.shape
        q, k, v = self.project(x)
        if rotary.temperature is not None:
            q = (q * rotary.temperature).to(q.dtype)
        k = apply_rotary(k, *rotary.tables[0], self.interleaved)
        whole = context.is_causal
        if cache is not None:
            if context.positions_given:
                raise ValueError("with a cache, dual chunk attention takes no position_ids")
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
            whole = cache.uniform_past is not None
        if whole and not context.positions_given and self.implementation != "eager":
            out = self.by_chunks(q, k, v, rotary)
        else:
            key_positions = context.positions if cache is None else cache.key_index
            out = self.at_once(q, k, v, rotary, context, key_positions)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, H*D) -> (B, T, C)

    def turned(self, q, table, rows: slice = slice(None)):
        """Rotate some of the queries q (B, H, T, D)."""
        return apply_rotary(q[:, :, rows], *(part[:, rows] for part in table), self.interleaved)

    def at_once(self, q, k, v, rotary: ChunkTables, context: AttentionContext, key_positions):
        """Attend to keys at any positions, (B or 1, S). q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

        Where positions start again in a row without documents, d < 0 counts as intra-chunk.
        """
        scores = scores_of(self.turned(q, rotary.tables[0]), k, self.scale)  # (B, H, T, S)
        for table, mask in zip(rotary.tables[1:], rotary.further(key_positions), strict=False):
            scores = torch.where(mask, scores_of(self.turned(q, table), k, self.scale), scores)
        return average(scores, v, context, self.dropout)

    def by_chunks(self, q, k, v, rotary: ChunkTables):
        """Attend to the keys at 0 .. S - 1 of rows whose last T tokens are the queries. Shapes as above."""
        # One copy at most: slices of keys that cannot be viewed as (B*G, S, D) would be copied in each block.
        k, v = (part.flatten(0, 1).unflatten(0, part.shape[:2]) for part in (k, v))
        s, end, outs = rotary.stride, k.shape[2], []
        first = start = end - q.shape[2]
        while start < end:
            chunk = start // s * s
            before = max(chunk - s, 0)
            stop = min(end, chunk + s, start + BLOCK)
            parts, rows = [], slice(start - first, stop - first)
            ranges = slice(chunk, stop), slice(before, chunk), slice(0, before)
            for table, keys in zip(rotary.tables, ranges, strict=True):
                if keys.start < keys.stop:
                    some = self.turned(q, table, rows), k[:, :, keys], v[:, :, keys]
                    parts.append(partial_attention(*some, self.scale, self.dropout, causal=not parts))
            outs.append(merge(parts).to(v.dtype))
            start = stop
        return torch.cat(outs, dim=2)


def partial_attention(q, k, v, scale: float, dropout: float, causal: bool):
    """Attend to some keys only: return the output (B, H, T, D) and its LSE (B, H, T, 1), in fp32 or wider.

    With `causal`, the queries are those of the last T keys. q (B, H, T, D), k and v (B, G, S, D).
    """
    scores = scores_of(q, k, scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if causal:
        T, S = scores.shape[2:]
        scores = scores + torch.full_like(scores[0, 0], -torch.inf).triu(S - T + 1)
    top = scores.detach().amax(dim=-1, keepdim=True)  # the result does not depend on it
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return weighted_sum(F.dropout(weights, dropout).to(v.dtype), v) / total, top + total.log()


def merge(parts):
    """Merge pairs (output, LSE) of disjoint sets of keys into the output for all keys."""
    outs, lses = zip(*parts, strict=True)
    shares = torch.stack(lses).softmax(dim=0)  # each denominator's share of their sum
    return (shares * torch.stack(outs)).sum(dim=0)


def lesson():
    """Print the distances that RoPE sees, as the paper's figure does, and check both paths."""
    c, w, s, T = 6, 2, 4, 12
    queries = torch.stack(three_positions(torch.arange(T), c, s))  # (3, T)
    print(f"DCA: distances of {T} tokens, chunk_size {c} (the largest), local_size {w}: chunks of {s}")
    for i in range(T):
        print("  ", *[f"{queries[min(i // s - j // s, 2), i] - j % s:2d}" for j in range(i + 1)])
    torch.manual_seed(0)
    layer = DualChunkAttention(ModelConfig(hidden_size=64, head_dim=16), 0)
    x, context = torch.randn(1, 1000, 64), build_context(1000, "cpu")
    rotary = DualChunkRotary(RotaryEmbedding(16), {"chunk_size": 384, "local_size": 64})
    a, b = (layer(x, context, rotary(context.positions)) for layer.implementation in ("auto", "eager"))
    print(f"1000 tokens in chunks of 320: by chunks - at once: {(a - b).abs().max().item():.0e}")


if __name__ == "__main__":
    lesson()
