"""A key/value cache in 8 or 4 bits: codes of past tokens, and the newest tokens as they are.

    code = round((x - low) / scale)        scale = (high - low) / (2^bits - 1)        x ~ low + scale * code

Keys have a few channels that are large for every token, so each channel of a head gets a low and a scale of
its own; values have none, and each token gets its own, for all heads (KIVI, arXiv 2402.02750). Numbers per channel need
several tokens at once: the row is cut into blocks of N = 32 tokens, and a block becomes codes when it is full.
Tokens after the last coded block are kept in a ring, in two bytes per number (token t in slot t mod ring).

    codes (L, 2, B, G, S/N, N, D) bytes, N/2 rows of them with 4 bits: token i and token i + N/2 share a byte
    low and scale of keys (L, B, G, S/N, 1, D), of values (L, B, 1, S/N, N, 1), in fp16

Attention reads the past decoded and the new tokens exactly. Methods as in `modules/attention/cache.py`.

Crop: a forward over at most `margin` tokens codes only blocks that were full before it, so taking back its
tokens, rejected drafts, leaves no trace. A deeper cut decodes the block that it hits, back into the ring: its
tokens stay as they were last read, and are rounded a second time when their block is full again.

Trap: codes are computed from low and scale as they are stored. Those of the exact numbers would be decoded
with others.
"""

import torch

from modules.attention.cache import KVCache

BLOCK = 32  # N, tokens that share the low and the scale of a key channel
SHARED = ((-2,), (-3, -1))  # dimensions of (.., G, N, D) with one low: tokens for keys, heads and channels for values


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
        place = (num_layers, batch_size, num_key_value_heads, (capacity - 1) // BLOCK)  # the last: in the ring
        rows = BLOCK * bits // 8
        shape = (num_layers, 2, *place[1:], rows, head_dim)
        self.codes = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.ranges = [  # of keys and of values: low and scale, (2, L, B, G or 1, S/N, 1 or N, D or 1)
            torch.zeros(2, *place, *shape, dtype=torch.float16, device=device)
            for place, shape in ((place, (1, head_dim)), ((*place[:2], 1, place[3]), (BLOCK, 1)))
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
        held = [(row, token) for row, past in enumerate(self._past) for token in range(known[row], past)]
        due = [
            (row, block)
            for row, old in enumerate(known)
            for block in range(old // BLOCK, self._coded[row] // BLOCK)
        ]
        self._held, self._due = (self._indices(pairs) for pairs in (held, due))
        self._kept = self._writes(self.ring)

    def _indices(self, pairs):
        """Return the two columns of a list of pairs as index tensors."""
        return torch.tensor(pairs, dtype=torch.long).view(-1, 2).T.to(self.device)

    def append(self, layer: int, keys, values):
        """keys, values (B, G, T, D) of the new tokens -> all (B, G, S, D), decoded. Padding is not kept."""
        most = torch.finfo(torch.float16).max
        new = torch.stack([keys, values]).to(self.dtype).clamp(-most, most)  # (2, B, G, T, D)
        read = self._read(layer)  # (2, B, G, S, D)
        if self._uniform:
            read[:, :, :, self._past[0] :] = new
        else:
            read[:, self._row, :, self._slot] = new[:, self._row, :, self._column]
        if self._due.numel():
            self._encode(layer, read)
        row, column, slot = self._kept
        self.store[layer][:, row, :, slot] = new[:, row, :, column].to(self.store.dtype)
        return read.unbind()

    def _read(self, layer: int):
        """Return the past tokens, decoded or from the ring, and zeros for others: (2, B, G, S, D)."""
        _, _, B, G, _, D = self.store.shape
        read = self.store.new_zeros(2, B, G, self._span, D, dtype=self.dtype)
        if self._blocks:
            blocks = read[:, :, :, : self._blocks * BLOCK].unflatten(3, (-1, BLOCK))
            for part, ranges in enumerate(self.ranges):
                codes = self.codes[layer, part, :, :, : self._blocks]
                blocks[part] = dequantize(codes, *ranges[:, layer, :, :, : self._blocks], self.bits)
        row, token = self._held
        read[:, row, :, token] = self.store[layer][:, row, :, token % self.ring].to(self.dtype)
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
    """x (.., N, D) -> codes (.., N, D) bytes, two to a byte with 4 bits (.., N/2, D); low, scale over `dims`."""
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    low, scale = low.half(), ((high - low) / (2**bits - 1)).half()
    codes = (x - low) / torch.where(scale > 0, scale, 1)  # equal numbers have code 0
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, dim=-2)
        codes = first << 4 | second
    return codes, low, scale


def dequantize(codes, low, scale, bits: int):
    """Undo `quantize`, up to half a step: codes -> (.., N, D) in fp32."""
    if bits == 4:
        codes = torch.cat([codes >> 4, codes & 15], dim=-2)
    return codes.float().mul_(scale.float()).add_(low.float())


def lesson():
    """Print how far rounded keys are off, per channel and per token, and the memory of a cache."""
    torch.manual_seed(0)
    keys = torch.randn(4, BLOCK, 64)
    keys[..., ::16] += 8  # a few channels are large for every token, as in trained models
    queries = torch.randn(100, 64) / 8
    print("Keys with four large channels, rounded: how far scores of queries are off, on average")
    for bits in (8, 4):
        for name, dims in zip(("channel", "token"), SHARED):
            off = (queries @ (dequantize(*quantize(keys, dims, bits), bits) - keys).mT).abs().mean()
            print(f"  {bits} bits, one scale per {name:7}: {off:.4f}")
    print("Memory of one row, against fp32, 4 heads of 32 and 8 of 128")
    print("   tokens   int8        int4")
    for tokens in (64, 256, 512, 4096):
        shares = []
        for bits in (8, 4):
            for sizes in ((4, 32), (8, 128)):
                sizes = (1, 1, tokens, *sizes, torch.float32, "cpu")
                shares.append(QuantizedKVCache(*sizes, bits).bytes / KVCache(*sizes).bytes)
        print(f"  {tokens:7,d}", *(f"{share:6.3f}" for share in shares))


if __name__ == "__main__":
    lesson()
