"""A key/value cache in 8 or 4 bits: codes of past tokens, and the newest tokens as they are.

    code = round((x - low) / scale)        scale = (high - low) / (2^bits - 1)        x ~ low + scale * code

Keys have a few channels that are large for every token, so each channel of a head gets a low and a scale of
its own; values have none, and each token gets its own, for all heads (KIVI, arXiv 2402.02750). Numbers per
channel need several tokens at once: a row is cut into blocks of N = 32 tokens, and a block becomes codes when
it is full. Later tokens are kept in a ring, in two bytes per number (token t in slot t mod ring).

    codes (L, 2, B, G, S/N, N, D) bytes; with 4 bits (.., N/2, D): token i and token i + N/2 share a byte
    low and scale of keys (L, B, G, S/N, 1, D), of values (L, B, 1, S/N, N, 1), in fp16

Attention reads the past decoded and the new tokens exactly. Methods as in `modules/attention/cache.py`.

Crop: a forward over at most `margin` tokens codes only blocks that were full before it, so taking back its
tokens, rejected drafts, leaves no trace. A deeper crop decodes the block that it cuts, and writes it back
into the ring. Its tokens are rounded a second time when the block is full again.

Trap: codes are computed from low and scale as they are stored. Those of the exact numbers would be decoded
with others.
"""

import torch

from modules.attention.cache import KVCache

BLOCK = 32  # N, tokens that share the low and the scale of a key channel
SHARED = ((-2,), (-3, -1))  # dimensions of keys and of values (.., G, N, D) that share a low and a scale


class QuantizedKVCache(KVCache):
    """Keys and values in `bits` bits, 8 or 4; other arguments as for `KVCache`.

    Values beyond 65,504, the largest of fp16, are cut to it. `coded[b]` counts the tokens of row b in codes.
    """

    def __init__(
        self, num_layers, batch_size, capacity, num_key_value_heads, head_dim, dtype, device, bits: int,
        margin: int = 1,
    ):  # fmt: skip
        half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        ring = min(BLOCK + margin, capacity)
        super().__init__(num_layers, batch_size, ring, num_key_value_heads, head_dim, half, device)
        self.capacity, self.planned = capacity, [capacity] * batch_size
        self.dtype, self.bits, self.ring, self.margin = dtype, bits, ring, margin
        L, B, G, D = num_layers, batch_size, num_key_value_heads, head_dim
        blocks = (capacity - 1) // BLOCK  # the last one stays in the ring
        self.codes = torch.zeros(L, 2, B, G, blocks, BLOCK * bits // 8, D, dtype=torch.uint8, device=device)
        self.ranges = [  # of keys and of values: low and scale
            torch.zeros(2, L, B, *shape, dtype=torch.float16, device=device)
            for shape in ((G, blocks, 1, D), (1, blocks, BLOCK, 1))
        ]
        self.coded = [0] * batch_size

    def _plan(self):
        """Choose what to read from the ring, which blocks become codes, and what to write into the ring."""
        super()._plan()
        short = self._tokens <= self.margin
        ends = [past + new * (not short) for past, new in zip(self._past, self._new, strict=True)]
        known = [min(pair) for pair in zip(self.coded, self._past, strict=True)]
        self._coded = [max(old, (end - 1) // BLOCK * BLOCK) for old, end in zip(known, ends, strict=True)]
        self._blocks = max(known) // BLOCK  # of the longest row, to decode
        spans = [*enumerate(zip(known, self._past, self._coded, strict=True))]
        # (row, token) to read from the ring, (row, block) to turn into codes
        held = [(row, token) for row, (old, past, _) in spans for token in range(old, past)]
        due = [(row, start // BLOCK) for row, (old, _, to) in spans for start in range(old, to, BLOCK)]
        self._held, self._due = (
            torch.tensor(pairs, dtype=torch.long).view(-1, 2).T.to(self.device) for pairs in (held, due)
        )
        # the tokens to read from the ring, if they are the same in every row
        self._run = slice(known[0], self._past[0]) if self._uniform and len({*known}) == 1 else None
        self._kept = self._writes(self.ring)

    def append(self, layer: int, keys, values):
        """keys, values (B, G, T, D) of the new tokens -> all (B, G, S, D), decoded. Padding is not kept."""
        most = torch.finfo(torch.float16).max
        new = torch.stack([keys, values]).clamp(-most, most)  # (2, B, G, T, D)
        read = self._read(layer)
        if self._uniform:
            read[:, :, :, self._past[0] :] = new
        else:
            read[:, self._row, :, self._slot] = new[:, self._row, :, self._column].to(read.dtype)
        if self._due.numel():
            self._encode(layer, read)
        row, column, slot = self._kept
        self.store[layer][:, row, :, slot] = new[:, row, :, column].to(self.store.dtype)
        return read.to(self.dtype).unbind()

    def _read(self, layer: int):
        """Return the past tokens, decoded or from the ring, and room for the new: (2, B, G, S, D)."""
        _, _, B, G, _, D = self.store.shape
        wide, shape = torch.promote_types(self.dtype, torch.float32), (2, B, G, self._span, D)
        make = torch.empty if self._uniform else torch.zeros  # gaps between rows must not be NaN
        read = make(shape, dtype=wide, device=self.device)
        if self._blocks:
            blocks = read[:, :, :, : self._blocks * BLOCK].unflatten(3, (-1, BLOCK))
            for part, (low, scale) in enumerate(self.ranges):
                parts = (self.codes[layer, part], low[layer], scale[layer])
                dequantize(*(one[:, :, : self._blocks] for one in parts), self.bits, out=blocks[part])
        row, token = self._held
        if self._run is not None:  # quicker
            slots = torch.arange(self._run.start, self._run.stop, device=self.device) % self.ring
            read[:, :, :, self._run] = self.store[layer].index_select(3, slots)
        else:
            read[:, row, :, token] = self.store[layer][:, row, :, token % self.ring].to(wide)
        return read

    def _encode(self, layer: int, read):
        """Turn the blocks that are due into codes. read (2, B, G, S, D)."""
        row, block = self._due
        tokens = block[:, None] * BLOCK + torch.arange(BLOCK, device=self.device)  # (n, N)
        full = read[:, row[:, None], :, tokens].permute(2, 0, 3, 1, 4)  # (n, N, 2, G, D) -> (2, n, G, N, D)
        for part, ranges in enumerate(self.ranges):
            codes, *both = quantize(full[part], SHARED[part], self.bits)
            self.codes[layer, part][row, :, block] = codes
            for stored, some in zip(ranges[:, layer], both, strict=True):
                stored[row, :, block] = some

    def advance(self) -> None:
        """End the forward."""
        super().advance()
        self.coded = self._coded

    def crop(self, lengths: list[int]) -> None:
        """Discard all tokens of row b from index lengths[b] on."""
        super().crop(lengths)
        for row, length in enumerate(lengths):
            if length < self.coded[row]:
                block = length // BLOCK
                self.coded[row] = block * BLOCK
                tokens = torch.arange(block * BLOCK, length, device=self.device)
                for part, ranges in enumerate(self.ranges):
                    place = (slice(None), row, slice(None), block)  # every layer and head
                    full = dequantize(self.codes[:, part][place], *(one[place] for one in ranges), self.bits)
                    kept = full[:, :, : len(tokens)].to(self.store.dtype)  # (L, G, tokens, D)
                    self.store[:, part, row, :, tokens % self.ring] = kept

    def select(self, rows: list[int]) -> None:
        """Replace the rows of the batch by copies of these."""
        super().select(rows)
        index = torch.tensor(rows, device=self.device)
        self.codes, *self.ranges = (one.index_select(2, index) for one in (self.codes, *self.ranges))
        self.coded = [self.coded[row] for row in rows]

    @property
    def bytes(self) -> int:
        """The allocated memory, in bytes."""
        return sum(one.numel() * one.element_size() for one in (self.store, self.codes, *self.ranges))


def quantize(x, dims: tuple[int, ...], bits: int):
    """x (.., N, D) -> codes, bytes (.., N, D) or with 4 bits (.., N/2, D), and low and scale over `dims`."""
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    low, scale = low.half(), ((high - low) / (2**bits - 1)).half()
    codes = (x - low) / torch.where(scale > 0, scale, 1)  # equal numbers have code 0
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, dim=-2)
        codes = first << 4 | second
    return codes, low, scale


def dequantize(codes, low, scale, bits: int, out=None):
    """Undo `quantize`, up to half a step: codes -> (.., N, D), in fp32 or into `out`."""
    if out is None:
        N, D = codes.shape[-2] * 8 // bits, codes.shape[-1]
        out = torch.empty(*codes.shape[:-2], N, D, device=codes.device)
    if bits == 4:
        first, second = out.chunk(2, dim=-2)
        first.copy_(codes >> 4)
        second.copy_(codes & 15)
    else:
        out.copy_(codes)
    return out.mul_(scale.to(out.dtype)).add_(low.to(out.dtype))


def lesson():
    """Print the error of attention scores if keys are rounded with one scale per channel or per token."""
    torch.manual_seed(0)
    keys = torch.randn(4, BLOCK, 64)
    keys[..., ::16] += 8  # a few channels are large for every token, as in trained models
    queries = torch.randn(100, 64) / 8
    print("Keys with four large channels, rounded: how far scores of queries are off, on average")
    for bits in (8, 4):
        for name, dims in zip(("channel", "token"), SHARED):
            off = (queries @ (dequantize(*quantize(keys, dims, bits), bits) - keys).mT).abs().mean()
            print(f"  {bits} bits, one scale per {name:7}: {off:.4f}")


if __name__ == "__main__":
    lesson()
