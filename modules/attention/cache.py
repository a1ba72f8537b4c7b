"""Key/value caches: what attention has computed for past tokens is kept, not computed again.

Generating token t without a cache costs t tokens of work, with one it costs 1. The price is memory:
2 * layers * G * D numbers per token (keys and values), the reason for grouped-query attention and for MLA.

One class per kind of content, all with the same verbs:

  begin(tokens, new_tokens)  a forward over `tokens` columns starts; of row b only `new_tokens[b]` are real
  append(layer, ...)         one layer hands in its part for the new tokens and reads back what may be seen
  advance()                  all layers are done: rows grow by their new tokens
  crop(lengths)              forget the newest tokens, down to a length per row (rejected drafts)
  start_with(layer, ...)     put a prefix in front, once, before any token

`lengths` is a plain list of ints, one per row: rows of one batch may differ, and knowing them costs no device
synchronisation. Memory is taken once, at the start. A token's index is its place in its row; `key_index` says
which token each slot holds, -1 for none, and `modules/attention/context.py` turns that into the mask.
"""

import torch


class KVCache:
    """Keys and values of every past token: slot s holds token s.

    Args:
        num_layers, batch_size, num_key_value_heads (G), head_dim (D): shapes.
        capacity: the most tokens that a row can hold.
    """

    parts = 2  # tensors per layer: keys and values

    def __init__(self, num_layers, batch_size, capacity, num_key_value_heads, head_dim, dtype, device):
        shape = (num_layers, self.parts, batch_size, num_key_value_heads, capacity, head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)  # zeros: an unread slot must not be NaN
        self.capacity, self.lengths, self.device = capacity, [0] * batch_size, device

    @property
    def uniform_past(self) -> int | None:
        """The common length of all rows before this forward, or None where they differ."""
        return self._past[0] if self._uniform else None

    def begin(self, tokens: int, new_tokens: list[int] | None = None) -> None:
        """Open a forward over `tokens` columns; of row b the first `new_tokens[b]` are real (None: all)."""
        self._past, self._tokens = list(self.lengths), tokens
        self._new = list(new_tokens) if new_tokens is not None else [tokens] * len(self.lengths)
        self._uniform = len(set(self._past)) == 1 and new_tokens is None
        if len(self._new) != len(self.lengths) or not all(0 <= new <= tokens for new in self._new):
            raise ValueError(f"new_tokens: {len(self.lengths)} numbers from 0 to {tokens}, not {self._new}")
        ends = [past + new for past, new in zip(self._past, self._new, strict=True)]
        if max(ends) > self.capacity:
            row = ends.index(max(ends))
            raise ValueError(
                f"the cache holds {self.capacity} tokens a row; row {row} has {self._past[row]} and gets "
                f"{self._new[row]} more: make it with a larger capacity"
            )
        if self._uniform:
            start = self._past[0]
            self.query_index = torch.arange(start, start + tokens, device=self.device)[None]  # (1, T)
        else:
            past = torch.tensor(self._past, device=self.device)[:, None]
            self.query_index = past + torch.arange(tokens, device=self.device)  # (B, T)
        self._plan()

    def _plan(self):
        """Slot s holds token s, so the past is k <= q."""
        self._span = max(past + new for past, new in zip(self._past, self._new, strict=True))
        self.key_index = torch.arange(self._span, device=self.device)[None]  # (1, S)
        if not self._uniform:
            self._row, self._column, self._slot = self._writes(self.capacity)

    def _writes(self, slots: int):
        """Row, column and slot of every new token that is kept: the last `slots` real ones of each row.

        From the lists, without asking the device anything.
        """
        kept = [
            (row, column, (past + column) % slots)
            for row, (past, new) in enumerate(zip(self._past, self._new, strict=True))
            for column in range(max(0, new - slots), new)
        ]
        return torch.tensor(kept, dtype=torch.long).view(-1, 3).T.to(self.device)

    def append(self, layer: int, keys, values):
        """keys, values (B, G, T, D) of the new tokens -> all keys, values (B, G, S, D).

        Columns beyond a row's real tokens are not kept; what their queries see has no meaning.
        """
        return self._put(self.store[layer, 0], keys), self._put(self.store[layer, 1], values)

    def _put(self, stored, new):
        """Write new (B, G, T, D) into stored (B, G, capacity, D) -> all that may be seen (B, G, S, D)."""
        if self._uniform:
            stored[:, :, self._past[0] : self._past[0] + self._tokens] = new
        else:
            stored[self._row, :, self._slot] = new[self._row, :, self._column].to(stored.dtype)
        return stored[:, :, : self._span]

    def advance(self) -> None:
        """Close the forward: each row grows by its real new tokens."""
        self.lengths = [past + new for past, new in zip(self._past, self._new, strict=True)]

    def crop(self, lengths: list[int]) -> None:
        """Forget all tokens of row b from index lengths[b] on."""
        for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"row {row} holds {old} tokens and cannot be cropped to {new}")
        self.lengths = list(lengths)

    def start_with(self, layer: int, *parts) -> None:
        """Put a prefix in front, keys and values (B or 1, G, P, D); for every layer, before any token."""
        length = parts[0].shape[2]
        if set(self.lengths) - {0, length}:
            raise ValueError("a prefix goes in front: this cache already holds tokens")
        if length > self.capacity:
            raise ValueError(f"a prefix of {length} does not fit: the cache holds {self.capacity} a row")
        for number, part in enumerate(parts):
            self.store[layer, number, :, :, :length] = part
        self.lengths = [length] * len(self.lengths)

    @property
    def bytes(self) -> int:
        """Memory taken, in bytes."""
        return self.store.numel() * self.store.element_size()


class RollingKVCache(KVCache):
    """Keys and values of the last W tokens only, in a ring: token t lives in slot t mod capacity.

    For models with a sliding window: memory does not grow with the text. The ring has `margin` slots more
    than the W - 1 past tokens that a window needs; up to `margin` tokens can be written before they are read,
    and as many be cropped again. A longer piece (a prompt) is attended to beside the ring, and only its end
    is kept.
    """

    def __init__(
        self, num_layers, batch_size, window, num_key_value_heads, head_dim, dtype, device, margin: int = 16
    ):
        self.ring, self.window, self.margin = window - 1 + margin, window, margin
        super().__init__(num_layers, batch_size, self.ring, num_key_value_heads, head_dim, dtype, device)
        self.capacity = 2**62  # rows may grow without end; `ring` is what they occupy
        self.held = torch.full((batch_size, self.ring), -1, device=device)  # the token in each slot
        self.longest = [0] * batch_size  # the most tokens that each row ever had: `ring` before them are gone

    @property
    def uniform_past(self) -> None:
        """Always None: slots of a ring are out of order or empty, so attention always needs the mask."""
        return None

    def _plan(self):
        """Slots to write, and the token of every key that queries meet: (B, ring) or (B, ring + T)."""
        index = self.query_index.expand(len(self.lengths), -1)  # (B, T)
        self._long = self._tokens > self.margin
        self._row, self._column, self._slot = self._writes(self.ring)
        before = self.held.clone() if self._long else None
        self.held[self._row, self._slot] = index[self._row, self._column]
        self.key_index = self.held
        if self._long:  # padding stands behind every real query, so causality hides it
            self.key_index = torch.cat([before, index], dim=1)

    def append(self, layer: int, keys, values):
        """keys, values (B, G, T, D) of the new tokens -> all in reach, ordered as `key_index`."""
        read = []
        for stored, new in ((self.store[layer, 0], keys), (self.store[layer, 1], values)):
            beside = torch.cat([stored, new], dim=2) if self._long else None  # before the ring is overwritten
            stored[self._row, :, self._slot] = new[self._row, :, self._column].to(stored.dtype)
            read.append(beside if self._long else stored)
        return read

    def crop(self, lengths: list[int]) -> None:
        """Forget all tokens of row b from index lengths[b] on: at most `margin` below the longest it ever
        was, since every newer token has replaced one that the window would need again."""
        for row, (most, new) in enumerate(zip(self.longest, lengths, strict=True)):
            if most > self.ring and most - new > self.margin:
                least = most - self.margin
                raise ValueError(f"row {row} of the ring held {most} tokens: crop it to {least}, not {new}")
        super().crop(lengths)
        limit = torch.tensor(lengths, device=self.device)[:, None]
        self.held.masked_fill_(self.held >= limit, -1)

    def advance(self) -> None:
        """Close the forward."""
        super().advance()
        self.longest = [max(pair) for pair in zip(self.longest, self.lengths, strict=True)]

    def start_with(self, layer: int, keys, values) -> None:
        """Not for a ring: a prefix must stay, and a ring forgets."""
        raise ValueError("a prefix cannot live in a rolling cache: use a model without sliding_window")


def lesson():
    """What a cache saves, and what it costs: work and memory to generate 256 tokens."""
    layers, heads, groups, dim, tokens = 4, 8, 4, 32, 256
    without = sum(range(1, tokens + 1))
    print(f"KV cache: to generate {tokens} tokens the model reads {without:,} without one, {tokens} with")
    for name, kv_heads in (("MHA", heads), ("GQA", groups), ("MQA", 1)):
        cache = KVCache(layers, 1, tokens, kv_heads, dim, torch.bfloat16, "cpu")
        print(f"  {name} with {kv_heads} key/value heads: {cache.bytes / tokens:6.0f} bytes per token")
    rolling = RollingKVCache(layers, 1, 64, groups, dim, torch.bfloat16, "cpu")
    print(f"  a window of 64 tokens needs {rolling.bytes:,} bytes, however long the text")
    cache = KVCache(1, 2, 8, 1, 2, torch.float32, "cpu")
    cache.begin(3, new_tokens=[3, 1])  # two prompts in one batch, of 3 tokens and of 1
    cache.append(0, torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2))
    cache.advance()
    print("  rows of one batch may differ: lengths", cache.lengths)
    cache.crop([2, 1])
    print("  a rejected draft is forgotten: lengths", cache.lengths)


if __name__ == "__main__":
    lesson()
