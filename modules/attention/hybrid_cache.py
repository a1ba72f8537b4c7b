"""A key/value cache for a pattern of layers: global layers keep every token, local ones only what they see.

    layers     local  local  global  local  local  global       every third is global
    keeps      ring   ring   all     ring   ring   all          so memory grows with a third of the layers

Gemma 3 (arXiv 2503.19786) makes every sixth layer global: those carry what is far away, and the others work
nearby. The methods are those of `modules/attention/cache.py`.

    keys, values: (B, G, T, D) of the new tokens  ->  (B, G, S, D), with another S for local layers

Trap: the two kinds hold different tokens in different slots, so each needs a mask of its own (`part`).
"""

import torch

from modules.attention.cache import KVCache
from modules.attention.rolling_cache import RollingKVCache


class HybridCache(KVCache):
    """The cache of the global layers, which holds that of the local ones, a ring, in `local`.

    Args:
        are_local: for each layer, whether it has the window; at least one has, and one has not.
        batch_size, capacity, num_key_value_heads, head_dim, dtype, device: as for `KVCache`.
        window, margin, sinks: as for `RollingKVCache`.
    """

    def __init__(
        self, are_local, batch_size, capacity, window, num_key_value_heads, head_dim, dtype, device,
        margin: int = 16, sinks: int = 0,
    ):  # fmt: skip
        place = (num_key_value_heads, head_dim, dtype, device)
        counts = [are_local.count(False), are_local.count(True)]
        super().__init__(counts[0], batch_size, capacity, *place)
        self.local = RollingKVCache(counts[1], batch_size, window, *place, margin, sinks)
        self.are_local = are_local
        self.places = [are_local[:layer].count(kind) for layer, kind in enumerate(are_local)]  # in its part

    def part(self, window: int | None):
        """Return the cache whose `key_index` is that of the layers with this window."""
        return self if window is None else self.local

    def begin(self, tokens: int, new_tokens: list[int] | None = None) -> None:
        """Start a forward; refused before the ring has changed if the tokens do not fit."""
        super().begin(tokens, new_tokens)
        self.local.begin(tokens, new_tokens)

    def append(self, layer: int, keys, values):
        """keys, values (B, G, T, D) of the new tokens -> those in reach, in the order of the part's index."""
        append = self.local.append if self.are_local[layer] else super().append
        return append(self.places[layer], keys, values)

    def advance(self) -> None:
        """End the forward."""
        super().advance()
        self.local.advance()

    def crop(self, lengths: list[int]) -> None:
        """Discard all tokens of row b from index lengths[b] on, as far as the ring can."""
        self.local.crop(lengths)  # first: it may refuse
        super().crop(lengths)

    def select(self, rows: list[int]) -> None:
        """Replace the rows of the batch by copies of these."""
        super().select(rows)
        self.local.select(rows)

    def start_with(self, layer: int, *parts) -> None:
        """Raise `ValueError`: the ring cannot keep a prefix."""
        self.local.start_with(layer, *parts)

    @property
    def bytes(self) -> int:
        """The allocated memory, in bytes."""
        return super().bytes + self.local.bytes


def lesson():
    """Print the memory of one row by its length: every layer global, every sixth, and none."""
    place, layers, window = (8, 128, torch.bfloat16, "meta"), 36, 1024
    local = [layer % 6 != 5 for layer in range(layers)]
    print(f"Cache of {layers} layers (8 heads of 128, bf16) in MiB, with a window of {window}")
    print("   tokens   all global   every 6th   none")
    for tokens in (1024, 4096, 16384, 32768):
        full = KVCache(layers, 1, tokens, *place).bytes
        some = HybridCache(local, 1, tokens, window, *place).bytes
        none = RollingKVCache(layers, 1, window, *place).bytes
        print(f"  {tokens:7,d} {full / 2**20:12,.0f} {some / 2**20:11,.0f} {none / 2**20:6,.0f}")


if __name__ == "__main__":
    lesson()
