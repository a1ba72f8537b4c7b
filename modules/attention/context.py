"""Who may look at whom: every rule of attention turned, once per forward, into one small object.

The rules, for a query with index q and a key with index k in the same row (counted from the row's start):

  causal     k <= q                      a token sees itself and the past
  window     k > q - W                   only the last W tokens, itself included (Mistral, arXiv 2310.06825)
  documents  document[k] == document[q]  texts packed into one row do not see each other
  padding    k is a real token

The keys of a prefix (modules/adapters/prefix.py) are no tokens: they stand in front of the row, and every
query sees them.

All layers read the same object; none builds a mask of its own. Where no rule needs a mask (whole causal rows,
or one new token that may see all the past) there is none, and kernels can use their own triangle. A row with
nothing to attend to gives zeros: `modules/attention/grouped_query.py` sees to that.

    mask: (B or 1, 1, T, S) bool, True = may look     T new tokens (queries), S keys (cached and new)
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AttentionContext:
    """What `modules/attention/grouped_query.py` needs to know beside q, k and v.

    Attributes:
        positions: (B or 1, T), the place of each query for rotary embeddings.
        mask: (B or 1, 1, T, S) bool, True where a query may look, or None if `is_causal` says it all.
        is_causal: True when T == S and the plain triangle is the only rule (then mask is None).
    """

    positions: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool

    def without_prefix(self, prefix: int):
        """The same for a layer whose attention has no prefix; `prefix` is what `build_context` was told."""
        return self if self.mask is None else replace(self, mask=self.mask[..., prefix:])


def build_context(
    tokens: int,
    device,
    *,
    causal: bool = True,
    window: int | None = None,
    position_ids=None,
    document_ids=None,
    padding_mask=None,
    cache=None,
    prefix: int = 0,
) -> AttentionContext:
    """The context of one forward over `tokens` new tokens per row.

    Args:
        tokens: T.
        device: where positions and mask live.
        causal: False lets every token see the whole row (encoders).
        window: W, or None for no limit.
        position_ids: (B, T) for rotary embeddings; by default the token's index in its row.
        document_ids: (B, T) int, equal within one document; without cache only.
        padding_mask: (B, T) bool or 0/1, True = real token; without cache only.
        cache: a cache of `modules/attention/cache.py` on which `begin` was called for these tokens; it knows
        how long
            each row is and which keys its slots hold.
        prefix: how many keys of a prefix stand in front. `position_ids` count from its end. A cache that
            starts with the prefix counts its keys among its own.
    """
    if cache is not None and (document_ids is not None or padding_mask is not None):
        raise ValueError("document_ids and padding_mask go without a cache; it takes `new_tokens` per row")
    if cache is None:
        query_index = key_index = torch.arange(prefix, prefix + tokens, device=device)[None]  # (1, T)
        past = prefix
    else:
        query_index, key_index = cache.query_index, cache.key_index  # (B or 1, T), (B or 1, S)
        past = cache.uniform_past  # None where rows have different lengths
    positions = query_index if position_ids is None else position_ids + prefix
    narrow = window is not None and (past is None or past + tokens > window)
    if not causal and window is None and document_ids is None and padding_mask is None and cache is None:
        return AttentionContext(positions, None, is_causal=False)  # everyone sees everyone
    if causal and not narrow and document_ids is None and padding_mask is None and past is not None:
        if past == 0:
            return AttentionContext(positions, None, is_causal=True)
        if tokens == 1:
            return AttentionContext(positions, None, is_causal=False)

    query, key = query_index[:, :, None], key_index[:, None, :]  # (B or 1, T, 1), (B or 1, 1, S)
    mask = (key >= 0).expand(-1, tokens, -1)  # an empty slot of a cache has index -1
    if causal:
        mask = mask & (key <= query)
    if window is not None:
        mask = mask & (key > query - window)
        if not causal:
            mask = mask & (key < query + window)
    if document_ids is not None:
        mask = mask & (document_ids[:, :, None] == document_ids[:, None, :])
    if padding_mask is not None:
        mask = mask & padding_mask.bool()[:, None, :]
    if prefix and cache is None:
        mask = F.pad(mask, (prefix, 0), value=True)  # (B or 1, T, n + T)
    return AttentionContext(positions, mask[:, None], is_causal=False)


def lesson():
    """The mask of one row that holds two documents, with and without a window; and with padding."""
    print("AttentionContext: rows are queries, columns keys, # may look")
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
