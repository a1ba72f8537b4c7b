"""A key/value cache for sliding windows: a ring that overwrites what no window can reach any more.

    ring = W - 1 + margin slots of a row:   token t is in slot t mod ring

With n attention sinks (sinks.py), tokens 0 .. n-1 stay in slots of their own, in front of the ring:

    n + ring slots of a row:   token t >= n is in slot n + (t - n) mod ring

Memory does not grow with the text: a window of W tokens (Mistral, arXiv 2310.06825) needs no more than W of
them, however long the text is. The methods are those of `modules/attention/cache.py`.

    keys, values: (B, G, T, D) of the new tokens  ->  (B, G, n + ring, D), or + T for a long piece
"""

import torch

from modules.attention.cache import KVCache


class RollingKVCache(KVCache):
    """Keys and values of the last W tokens only, in a ring, and of the first `sinks` tokens.

    A window needs W - 1 past tokens. The ring has `margin` slots more, so that up to `margin` tokens can be
    written before they are read, and cropped again. For a longer piece (a prompt), attention reads the ring
    and the piece side by side, and only the end of the piece is kept.
    """

    def __init__(
        self, num_layers, batch_size, window, num_key_value_heads, head_dim, dtype, device, margin: int = 16,
        sinks: int = 0,
    ):  # fmt: skip
        self.ring, self.window, self.margin, self.sinks = window - 1 + margin, window, margin, sinks
        slots = sinks + self.ring
        super().__init__(num_layers, batch_size, slots, num_key_value_heads, head_dim, dtype, device)
        self.capacity = 2**62  # rows may grow without end; they occupy `slots` slots
        self.planned = [None] * batch_size
        self.held = torch.full((batch_size, slots), -1, device=device)  # index of the token in each slot
        self.longest = [0] * batch_size  # the largest length of each row so far, which has used up slots

    @property
    def uniform_past(self) -> None:
        """Always None: the slots of a ring are out of order or empty, so attention always needs a mask."""
        return None

    def _plan(self):
        """Choose the slots to write, and set the index of every key: (B, n + ring), or + T if long."""
        index = self.query_index.expand(len(self.lengths), -1)  # (B, T)
        self._long = self._tokens > self.margin
        self._row, self._column, self._slot = self._writes(self.ring, self.sinks)
        before = self.held.clone() if self._long else None
        self.held[self._row, self._slot] = index[self._row, self._column]
        self.key_index = self.held
        if self._long:  # padding follows every real query, so causality hides it
            self.key_index = torch.cat([before, index], dim=1)

    def append(self, layer: int, keys, values):
        """keys, values (B, G, T, D) of the new tokens -> all within reach, in the order of `key_index`."""
        read = []
        for stored, new in ((self.store[layer, 0], keys), (self.store[layer, 1], values)):
            beside = torch.cat([stored, new], dim=2) if self._long else None  # before the ring is overwritten
            stored[self._row, :, self._slot] = new[self._row, :, self._column].to(stored.dtype)
            read.append(beside if self._long else stored)
        return read

    def crop(self, lengths: list[int]) -> None:
        """Discard all tokens of row b from index lengths[b] on.

        The cut may reach at most `margin` below the row's largest length so far, because each newer token has
        overwritten one that the window would need again.
        """
        for row, (most, new) in enumerate(zip(self.longest, lengths, strict=True)):
            if most > self.sinks + self.ring and most - new > self.margin:
                least = most - self.margin
                raise ValueError(
                    f"row {row} of the ring has held {most} tokens: crop it to {least} or more, not {new}"
                )
        super().crop(lengths)
        limit = torch.tensor(lengths, device=self.device)[:, None]
        self.held.masked_fill_(self.held >= limit, -1)

    def advance(self) -> None:
        """End the forward."""
        super().advance()
        self.longest = [max(pair) for pair in zip(self.longest, self.lengths, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Replace the rows of the batch by copies of these."""
        super().select(rows)
        self.held, self.longest = self.held[rows], [self.longest[row] for row in rows]

    def start_with(self, layer: int, keys, values) -> None:
        """Raise `ValueError`: a prefix must stay, and a ring overwrites."""
        raise ValueError("a rolling cache cannot keep a prefix: use a model without sliding_window")


def lesson():
    """Print which tokens a ring for a window of 3 holds while a text grows, and its memory."""
    cache = RollingKVCache(1, 1, 3, 1, 32, torch.bfloat16, "cpu", margin=2)
    print("A ring of 4 slots for a window of 3: the token in each slot (. = empty)")
    for tokens in (2, 1, 1, 1, 5, 1):
        cache.begin(tokens)
        cache.append(0, *torch.zeros(2, 1, 1, tokens, 32))
        cache.advance()
        held = " ".join("." if token < 0 else str(token) for token in cache.held[0].tolist())
        print(f"  {cache.lengths[0]:3d} tokens written: {held:10s} {cache.bytes} bytes")


if __name__ == "__main__":
    lesson()
