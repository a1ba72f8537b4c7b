"""Key/value caches: keep what attention has computed for past tokens instead of computing it again.

Generating token t costs t tokens of work without a cache and 1 with one. The price is memory: 2 * layers * G
* D numbers per token (keys and values), the reason for grouped-query attention and for MLA.

There is one class per kind of content (rolling_cache.py, hybrid_cache.py, latent_cache.py), all with the same
methods:

  begin(tokens, new_tokens)  start a forward over `tokens` columns; `new_tokens[b]` of row b are real
  append(layer, ...)         store one layer's keys and values of the new tokens; return all visible ones
  advance()                  end the forward: rows grow by their new tokens
  crop(lengths)              discard the newest tokens, down to a length per row (rejected drafts)
  start_with(layer, ...)     put a prefix in front, before any token
  select(rows)               keep these rows, each as often as it is named

`lengths` is a plain list of ints, one per row: rows of a batch may differ in length, and reading the list
needs no device synchronisation. All memory is allocated at the start. A token's index is its place in its
row; `key_index` holds the index of the token in each slot, -1 for none, and modules/attention/context.py
makes the mask from it.
"""

import torch


class KVCache:
    """Keys and values of every past token: slot s holds token s.

    Args:
        num_layers, batch_size, num_key_value_heads (G), head_dim (D): sizes of the store.
        capacity: the largest number of tokens in a row.

    Attributes:
        planned: the length that each row is meant to reach, None for unknown; rotary embeddings that depend
            on the length (modules/rope.py) are computed for it. May be set before the first token.
    """

    parts = 2  # tensors per layer: keys and values

    def __init__(self, num_layers, batch_size, capacity, num_key_value_heads, head_dim, dtype, device):
        shape = (num_layers, self.parts, batch_size, num_key_value_heads, capacity, head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)  # zeros: an unread slot must not be NaN
        self.capacity, self.lengths, self.device = capacity, [0] * batch_size, device
        self.prefix = 0  # tokens that `start_with` has put in front
        self.planned: list[int | None] = [capacity] * batch_size

    @property
    def uniform_past(self) -> int | None:
        """The common length of all rows before this forward, or None if they differ."""
        return self._past[0] if self._uniform else None

    def begin(self, tokens: int, new_tokens: list[int] | None = None) -> None:
        """Start a forward over `tokens` columns; in row b the first `new_tokens[b]` are real (None: all)."""
        self._past, self._tokens = list(self.lengths), tokens
        self._new = list(new_tokens) if new_tokens is not None else [tokens] * len(self.lengths)
        self._uniform = len(set(self._past)) == 1 and new_tokens is None
        if len(self._new) != len(self.lengths) or not all(0 <= new <= tokens for new in self._new):
            raise ValueError(
                f"new_tokens={self._new} must be {len(self.lengths)} numbers, each between 0 and {tokens}"
            )
        ends = [past + new for past, new in zip(self._past, self._new, strict=True)]
        if max(ends) > self.capacity:
            row = ends.index(max(ends))
            raise ValueError(
                f"the cache holds {self.capacity} tokens per row; row {row} has {self._past[row]} and gets "
                f"{self._new[row]} more: create it with a larger capacity"
            )
        columns, self.real = torch.arange(tokens, device=self.device), None  # real (B, T); None: every token
        if self._uniform:
            self.query_index = self._past[0] + columns[None]  # (1, T)
        else:
            self.query_index = torch.tensor(self._past, device=self.device)[:, None] + columns  # (B, T)
            self.real = columns < torch.tensor(self._new, device=self.device)[:, None]
        self._plan()

    def _plan(self):
        """Set the key indices: slot s holds token s, so the past is k <= q."""
        self._span = max(past + new for past, new in zip(self._past, self._new, strict=True))
        self.key_index = torch.arange(self._span, device=self.device)[None]  # (1, S)
        if not self._uniform:
            self._row, self._column, self._slot = self._writes(self.capacity)

    def _writes(self, ring: int, fixed: int = 0):
        """Return row, column and slot of every new token that is kept, of each row's real ones.

        Token t < `fixed` has slot t; the last `ring` of the others share `ring` slots behind. Computed from
        the lists, without reading from the device.
        """
        kept = []
        for row, (past, new) in enumerate(zip(self._past, self._new, strict=True)):
            early = min(max(fixed - past, 0), new)  # columns of tokens below `fixed`
            kept += [(row, column, past + column) for column in range(early)]
            late = range(max(early, new - ring), new)
            kept += [(row, column, fixed + (past + column - fixed) % ring) for column in late]
        return torch.tensor(kept, dtype=torch.long).view(-1, 3).T.to(self.device)

    def part(self, window: int | None):
        """Return the cache whose `key_index` is that of the layers with this window: all share one here."""
        return self

    def append(self, layer: int, keys, values):
        """keys, values (B, G, T, D) of the new tokens -> all of them (B, G, S, D). Padding is not kept."""
        return self._put(self.store[layer, 0], keys), self._put(self.store[layer, 1], values)

    def _put(self, stored, new):
        """Write new (B, G, T, D) into stored (B, G, capacity, D) and return the filled part (B, G, S, D)."""
        if self._uniform:
            stored[:, :, self._past[0] : self._past[0] + self._tokens] = new
        else:
            stored[self._row, :, self._slot] = new[self._row, :, self._column].to(stored.dtype)
        return stored[:, :, : self._span]

    def advance(self) -> None:
        """End the forward: each row grows by its real new tokens."""
        self.lengths = [past + new for past, new in zip(self._past, self._new, strict=True)]

    def crop(self, lengths: list[int]) -> None:
        """Discard all tokens of row b from index lengths[b] on."""
        for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"row {row} holds {old} tokens and cannot be cropped to {new}")
        self.lengths = list(lengths)

    def start_with(self, layer: int, *parts) -> None:
        """Put a prefix in front, keys and values (B or 1, G, P, D), in every layer, before any token.

        Raise `ValueError` if the cache holds tokens already, or is too small.
        """
        length = parts[0].shape[2]
        if set(self.lengths) != {self.prefix}:
            raise ValueError("a prefix goes in front: this cache already holds tokens")
        if length > self.capacity:
            raise ValueError(f"a prefix of {length} does not fit: the cache holds {self.capacity} per row")
        self.lengths = [0] * len(self.lengths)
        self.begin(length)
        self.append(layer, *(part.expand(len(self.lengths), -1, -1, -1) for part in parts))
        self.advance()
        self.prefix = length

    def select(self, rows: list[int]) -> None:
        """Replace the rows of the batch by copies of these: finished ones leave, and one prompt, read once,
        gets many continuations."""
        self.store = self.store.index_select(2, torch.tensor(rows, device=self.device))
        self.lengths, self.planned = ([each[row] for row in rows] for each in (self.lengths, self.planned))

    @property
    def bytes(self) -> int:
        """The allocated memory, in bytes."""
        return self.store.numel() * self.store.element_size()


def lesson():
    """Print what a cache saves and what it costs when 256 tokens are generated."""
    layers, heads, groups, dim, tokens = 4, 8, 4, 32, 256
    without = sum(range(1, tokens + 1))
    print(f"KV cache: to generate {tokens} tokens, the model reads {without:,} without one, {tokens} with")
    for name, kv_heads in (("MHA", heads), ("GQA", groups), ("MQA", 1)):
        cache = KVCache(layers, 1, tokens, kv_heads, dim, torch.bfloat16, "cpu")
        print(f"  {name} with {kv_heads} key/value heads: {cache.bytes / tokens:6.0f} bytes per token")
    cache = KVCache(1, 2, 8, 1, 2, torch.float32, "cpu")
    cache.begin(3, new_tokens=[3, 1])  # two prompts in one batch, of 3 tokens and of 1
    cache.append(0, torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2))
    cache.advance()
    print("  rows of one batch may differ in length:", cache.lengths)
    cache.crop([2, 1])
    print("  a rejected draft is discarded:", cache.lengths)


if __name__ == "__main__":
    lesson()
