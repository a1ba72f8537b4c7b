"""Cross attention: a decoder looks at a source, which is read once and stays the same while it writes.

    q = W_q x of each written token        k, v = W_k s, W_v s of the source s

Keys and values of the source do not depend on what is written. Each layer computes them once, before the
first token; from then on a token needs only its query. Positions play no part: the encoder has put them
into s.

    source s: (B, S, C)  ->  keys, values: (B, H, S, D) for each layer

Papers: Vaswani et al., arXiv 1706.03762 (section 3.2.3); Raffel et al., arXiv 1910.10683.

Trap: a source without any real token has nothing to attend to, and the softmax of nothing is NaN, in the
gradients too. Such a row may see all its keys: the source is zero at padding, so without biases the values
are zero as well, and attention returns zero.
"""

from dataclasses import dataclass

import torch

from modules.attention.cache import KVCache


@dataclass
class Source:
    """Keys and values that cross attention reads.

    Attributes:
        keys_values: for each layer, keys and values, each (B, H, S, D).
        bias: 0 for real tokens of the source and -inf for padding, (B, 1, 1, S); None if all are real.
    """

    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    bias: torch.Tensor | None

    def select(self, rows: list[int]) -> "Source":
        """Return copies of these rows, each as often as it is named."""
        bias = None if self.bias is None else self.bias[rows]
        return Source([(keys[rows], values[rows]) for keys, values in self.keys_values], bias)


def source_bias(padding_mask, dtype):
    """padding_mask (B, S), True for real tokens -> (B, 1, 1, S), 0 for what may be seen, -inf elsewhere."""
    if padding_mask is None:
        return None
    real = padding_mask.bool()
    seen = real | ~real.any(dim=-1, keepdim=True)  # the trap of the docstring
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, -torch.inf)[:, None, None]


class SourceCache(KVCache):
    """The cache of a decoder with a source: that of its own tokens, and what `select` must carry along.

    `crop` leaves the source as it is: it discards written tokens only.
    """

    def __init__(self, source: Source, capacity: int):
        keys = source.keys_values[0][0]
        B, H, _, D = keys.shape
        super().__init__(len(source.keys_values), B, capacity, H, D, keys.dtype, keys.device)
        self.source = source

    def select(self, rows: list[int]) -> None:
        """Replace the rows of the batch, and their sources, by copies of these."""
        super().select(rows)
        self.source = self.source.select(rows)

    @property
    def bytes(self) -> int:
        """The allocated memory, in bytes, that of the source included."""
        parts = [part for both in self.source.keys_values for part in both]
        return super().bytes + sum(part.numel() * part.element_size() for part in parts)


def lesson():
    """Print the work saved by computing keys and values of a source once, and what an empty source gives."""
    from config.seq2seq import Seq2SeqConfig
    from modules.attention.relative import RelativeAttention

    torch.manual_seed(0)
    config = Seq2SeqConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    attention, S, T, layers = RelativeAttention(config), 100, 40, 6
    print(f"A source of {S} tokens, {T} tokens to write, {layers} layers")
    print(f"  keys and values, computed for every token: {layers * S * T:6,} pairs; once: {layers * S:,}")
    source = torch.randn(2, S, 64)
    mask = torch.ones(2, S, dtype=torch.bool)
    mask[1] = False  # nothing to read
    keys, values = attention.keys_values(source * mask[:, :, None])
    cache = SourceCache(Source([(keys, values)] * layers, source_bias(mask, torch.float32)), capacity=T)
    print(f"  memory of two rows, own tokens and source: {cache.bytes / 1024:.0f} KiB")
    out = attention(torch.randn(2, 1, 64), keys, values, cache.source.bias)
    sizes = [f"{row.abs().mean():.3f}" for row in out]
    print("  mean size of what is read:", *sizes, "(the second is empty)")
    cache.select([1, 0, 0])
    print("  after select([1, 0, 0]) the cache has", cache.source.bias.shape[0], "rows of the source")


if __name__ == "__main__":
    lesson()
