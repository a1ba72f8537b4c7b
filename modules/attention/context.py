"""The rules of attention, applied once per forward: which query may attend to which key.

The rules, for a query with index q and a key with index k in the same row (counted from the row's start):

  causal     k <= q                      a token sees itself and the past
  window     k > q - W                   only the last W tokens, itself included (Mistral, arXiv 2310.06825),
             or k is a sink              and the first tokens of the text (sinks.py)
  documents  document[k] == document[q]  texts packed into one row do not see each other
  padding    k is a real token

Every query sees the keys of a prefix (modules/adapters/prefix.py), which stand in front of the row.

Layers with the same window read the same object; none builds a mask. If no rule needs a mask (whole causal
rows, or one new token that may see all the past) there is none, and kernels can use their own triangle.
Otherwise the object holds the rules, and makes the mask when a layer first asks for it, or one tile of it
for kernels that never hold all of it (flash.py).

    mask: (B or 1, 1, T, S) bool, True = may attend     T new tokens (queries), S keys (cached and new)

Trap: a query with nothing to attend to divides 0 by 0, and some kernels return NaN gradients for it. A real
token sees at least itself. A padding token would see nothing: it may attend to every key, since nobody reads
its output.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from modules.attention.sinks import sink_keys


@dataclass
class Rules:
    """The rules of attention as numbers per query and per key, from which any tile of the mask follows.

    Attributes:
        query_index: (B or 1, T), the index of each query in its row.
        key_index: (B or 1, S), that of each key; -1 for an empty slot of a cache.
        causal, window: as in `build_context`.
        prefix: keys with an index below this are visible to all.
        sinks: (B or 1, S) bool, keys that the window does not hide; None without such keys.
        query_documents, key_documents: (B, T) and (B, S), or None.
        real_queries, real_keys: (B, T) and (B, S) bool, or None if all are real.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    causal: bool = True
    window: int | None = None
    prefix: int = 0
    sinks: torch.Tensor | None = None
    query_documents: torch.Tensor | None = None
    key_documents: torch.Tensor | None = None
    real_queries: torch.Tensor | None = None
    real_keys: torch.Tensor | None = None
    plan: tuple | None = field(default=None, init=False, repr=False)  # of flash_triton.py, built on first use

    def tile(self, queries: slice = slice(None), keys: slice = slice(None)):
        """Return the mask of some queries and keys, (B or 1, t, s) bool, True = may attend."""
        query, key = self.query_index[:, queries, None], self.key_index[:, None, keys]
        mask = (key >= 0).expand(-1, query.shape[1], -1)
        if self.causal:
            mask = mask & (key <= query)
        if self.window is not None:
            near = key > query - self.window
            if not self.causal:
                near = near & (key < query + self.window)
            mask = mask & (near if self.sinks is None else near | self.sinks[:, None, keys])
        if self.query_documents is not None:
            mask = mask & (self.query_documents[:, queries, None] == self.key_documents[:, None, keys])
        if self.real_keys is not None:
            mask = mask & self.real_keys[:, None, keys]
        if self.real_queries is not None:
            mask = mask | ~self.real_queries[:, queries, None]  # padding may attend to every key
        if self.prefix:
            mask = mask | ((key >= 0) & (key < self.prefix))
        return mask


@dataclass
class AttentionContext:
    """The positions and rules of one forward pass, which all layers with the same window share.

    Attributes:
        positions: (B or 1, T), the position of each query for rotary embeddings; 0 for padding.
        rules: from which `mask` and `tile` follow; None if nothing is hidden, or only the future.
        is_causal: True if T == S and the plain triangle is the only rule (then `rules` is None).
        positions_given: True if the caller chose the positions; otherwise they are indices in the row.
    """

    positions: torch.Tensor
    rules: Rules | None
    is_causal: bool
    positions_given: bool = False
    shared: torch.Tensor | None = field(default=None, init=False, repr=False)  # the bias, built on first use

    @cached_property
    def mask(self):
        """The whole mask (B or 1, 1, T, S) bool, True where a query may attend; None without rules."""
        return None if self.rules is None else self.rules.tile()[:, None]

    def bias(self, dtype):
        """Return 0 where a query may attend and -inf elsewhere, (B or 1, 1, T, S), to be added to scores.

        None if there is nothing to hide. Built on the first call, then shared by all layers.
        """
        if self.shared is None or self.shared.dtype != dtype:
            mask, tokens = self.mask, self.positions.shape[1]
            if self.is_causal:
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=self.positions.device).tril()
            if mask is not None:
                zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                self.shared = zeros.masked_fill_(~mask, -torch.inf)
        return self.shared

    def without_prefix(self, prefix: int):
        """Return the context of a layer without the prefix; `prefix` is that given to `build_context`."""
        if self.rules is None or not prefix:
            return self
        parts = {"key_index": self.rules.key_index[:, prefix:], "prefix": 0}
        for name in ("sinks", "key_documents", "real_keys"):
            part = getattr(self.rules, name)
            parts[name] = None if part is None else part[:, prefix:]
        return replace(self, rules=replace(self.rules, **parts))


def build_context(
    tokens: int, device, *, causal: bool = True, window: int | None = None, position_ids=None,
    document_ids=None, padding_mask=None, cache=None, prefix: int = 0, sinks: int = 0,
) -> AttentionContext:  # fmt: skip
    """Return the context of one forward over `tokens` new tokens per row.

    Args:
        tokens: T.
        device: the device of positions and mask.
        causal: False lets every token see the whole row (encoders).
        window: W, or None for no limit.
        position_ids: (B, T) for rotary embeddings, counted from the end of the prefix; by default the index
            of a token in its row.
        document_ids: (B, T) int, equal within one document; without a cache only.
        padding_mask: (B, T) bool or 0/1, True = real token; without a cache only.
        cache: a cache on which `begin` was called for these tokens. It counts a prefix among its own keys.
        prefix: the number of keys that stand in front, without a cache.
        sinks: the number of tokens at the start of each row, or document, that no window hides.
    """
    if cache is not None and (document_ids is not None or padding_mask is not None):
        raise ValueError("document_ids and padding_mask need cache=None; a cache takes `new_tokens` per row")
    if cache is None:
        query_index = torch.arange(prefix, prefix + tokens, device=device)[None]  # (1, T)
        key_index = torch.arange(prefix + tokens, device=device)[None]  # (1, prefix + T)
        past, real = prefix, None if padding_mask is None else padding_mask.bool()  # (B, T)
    else:
        query_index, key_index = cache.query_index, cache.key_index  # (B or 1, T), (B or 1, S)
        past, real = cache.uniform_past, cache.real  # None if rows differ in length, None if all are real
    positions = query_index if position_ids is None else position_ids + prefix
    narrow = window is not None and (past is None or past + tokens > window + causal * sinks)
    if document_ids is None and real is None and past is not None and not narrow:
        if not causal and cache is None:
            return AttentionContext(positions, None, is_causal=False)  # everyone sees everyone
        if causal and (past == 0 or tokens == 1):
            return AttentionContext(positions, None, past == 0, position_ids is not None)
    if real is not None:
        positions = positions.masked_fill(~real, 0)
    rules = Rules(
        query_index, key_index, causal, window, prefix if cache is None else 0,
        sinks=sink_keys(key_index, sinks, prefix, document_ids, padding_mask) if sinks else None,
        query_documents=document_ids,
        key_documents=None if document_ids is None else F.pad(document_ids, (prefix, 0)),
        real_queries=real,
        real_keys=None if padding_mask is None else F.pad(real, (prefix, 0), value=True),
    )  # fmt: skip
    return AttentionContext(positions, rules, False, position_ids is not None)


def layer_contexts(windows, *sizes, cache=None, **rules) -> dict:
    """Return window -> the context of the layers with that window. Arguments as for `build_context`."""
    return {w: build_context(*sizes, window=w, cache=cache and cache.part(w), **rules) for w in set(windows)}


def lesson():
    """Print the mask of one row with two documents, with a window, and with padding."""
    print("AttentionContext: rows are queries, columns keys, # may attend")
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    for name, options in {
        "causal with two documents": {"document_ids": documents},
        "causal with a window of 3": {"window": 3},
        "causal, the last two tokens are padding": {"padding_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])},
    }.items():
        mask = build_context(7, "cpu", **options).mask[0, 0]
        print(f"  {name}")
        for row in mask:
            print("   ", "".join("#" if seen else "." for seen in row.tolist()))
    plain = build_context(7, "cpu")
    print("  nothing but causal: mask is", plain.mask, "and is_causal is", plain.is_causal)


if __name__ == "__main__":
    lesson()
