"""The cache in codes. Oracles: rounding as a loop over single numbers in fp64, torchao's rounding, and for
the verbs a plain record of every token, to which that loop is applied when its block is full."""

import itertools
import random

import pytest
import torch

from inference.fast.decoder import FastDecoder
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from inference.generation.speculative import SpeculativeGenerator
from model.caches import make_cache
from model.tinyseek import TinySeek
from modules.attention.cache import KVCache
from modules.attention.quantized_cache import BLOCK, SHARED, QuantizedKVCache, dequantize, quantize
from tests.modules.tools import shake, small_config
from utils.errors import UserError

HALF_STEP = 0.5 + 2**-8  # in steps; fp16 numbers have 11 bits, so the largest code may be off by 255 / 2^11


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half(number):
    """A Python float as fp16 holds it."""
    return torch.tensor(number, dtype=torch.float64).half().item()


def slow_round(line, bits):
    """What a group of numbers is read as, after it became codes: one number at a time."""
    low, scale = half(min(line)), half((max(line) - min(line)) / (2**bits - 1))
    codes = [min(max(round((one - low) / scale), 0), 2**bits - 1) if scale else 0 for one in line]
    return [low + scale * code for code in codes]


def slow_keys(block, bits):
    """The same for a block of keys (N, G, D): each channel of each head is a group."""
    out = torch.empty_like(block)
    for g, d in itertools.product(*map(range, block.shape[1:])):
        out[:, g, d] = torch.tensor(slow_round(block[:, g, d].tolist(), bits), dtype=torch.float64)
    return out


def slow_values(block, bits):
    """The same for values: each token is a group."""
    rows = [slow_round(row.flatten().tolist(), bits) for row in block]
    return torch.tensor(rows, dtype=torch.float64).view_as(block)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("G, D", [(1, 1), (2, 5)])
def test_rounding_is_that_of_the_loop(bits, G, D):
    """Numbers far from zero, small ones, equal ones and zeros; an odd number of channels too."""
    x = numbers(3, G, 6, D, seed=D) * torch.logspace(-2, 2, D, dtype=torch.float64) + 3
    x[0], x[1, :, :, 0], x[2, :, 3] = 0, -7.3, 0.1
    for dims, slow in zip(SHARED, (slow_keys, slow_values), strict=True):
        codes, low, scale = quantize(x, dims, bits)
        assert codes.dtype == torch.uint8 and codes.shape[-2] == 6 * bits // 8
        ours = dequantize(codes, low, scale, bits).double()
        expected = torch.stack([slow(one.transpose(0, 1), bits).transpose(0, 1) for one in x])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # decoded in fp32
        off = (ours - x).abs() - low.double().abs() * 2**-11  # at the lower end
        assert (off <= scale.double() * HALF_STEP + 1e-12).all()
        assert not ours[0].any() and (ours[1, :, :, 0] == half(-7.3)).all() | torch.tensor(dims != SHARED[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_torchao(bits):
    """Its zero point is the middle of the range as a float; both are given our low and scale, in fp32."""
    ops = pytest.importorskip("torchao.quantization.quant_primitives")
    x, options = numbers(7, 3, BLOCK, 5).float() + 1, (torch.uint8, 0, 2**bits - 1)
    for dims, group in zip(SHARED, ((1, 1, BLOCK, 1), (1, 3, 1, 5)), strict=True):
        codes, low, scale = quantize(x, dims, bits)
        asymmetric = ops.MappingType.ASYMMETRIC
        step, middle = (
            one.view(scale.shape)
            for one in ops._choose_qparams_affine_tinygemm(x, asymmetric, group, *options)
        )
        torch.testing.assert_close(scale.float(), step, rtol=2**-11, atol=0)
        torch.testing.assert_close(low.float(), middle - step * 2 ** (bits - 1), rtol=2**-11, atol=1e-5)
        ours = (scale.float(), low.float() + scale.float() * 2 ** (bits - 1))
        theirs = ops._quantize_affine_tinygemm(x, group, *ours, *options)
        theirs = ops._dequantize_affine_tinygemm(theirs, group, *ours, *options)
        gap = (dequantize(codes, low, scale, bits) - theirs).abs() / scale
        assert (gap > 1e-3).float().mean() < 0.01 and gap.max() < 1.01  # half-way between codes: either way


class Record:
    """The tokens of one row in plain lists, and which of them are codes by now."""

    def __init__(self, bits):
        self.bits, self.tokens, self.coded = bits, [], 0  # tokens: (L, 2, G, D) in fp64, as they are read

    def code(self, end):
        """Round whole blocks of the tokens before `end`, but never the last of them."""
        while self.coded + BLOCK < end:
            span = slice(self.coded, self.coded + BLOCK)
            block = torch.stack(self.tokens[span])  # (N, L, 2, G, D)
            for layer, part in itertools.product(range(block.shape[1]), range(2)):
                block[:, layer, part] = (slow_keys, slow_values)[part](block[:, layer, part], self.bits)
            self.tokens[span] = list(block)
            self.coded += BLOCK

    def forward(self, new, long):
        """Return what attention reads, and keep the new tokens (T, L, 2, G, D)."""
        read = [*self.tokens, *new]
        if not long:
            self.code(len(self.tokens))  # read before they are rounded: they have just been written
        self.tokens += list(new)
        if long:
            self.code(len(self.tokens))
        self.tokens[self.coded :] = [one.half().double() for one in self.tokens[self.coded :]]
        return read

    def crop(self, length):
        del self.tokens[length:]
        if length < self.coded:
            self.coded = length // BLOCK * BLOCK
            self.tokens[self.coded :] = [one.half().double() for one in self.tokens[self.coded :]]


@pytest.mark.parametrize("bits, G, D", [(8, 2, 4), (4, 1, 3)])
def test_every_verb_against_the_record(bits, G, D):
    """Prompts of different lengths, single tokens, drafts, resting rows, cuts deep and shallow, rows that
    leave and are copied, and a prefix of more than one block: what is read, token by token."""
    L, capacity, dice = 2, 150, random.Random(bits)
    cache = QuantizedKVCache(L, 3, capacity, G, D, torch.float64, "cpu", bits, margin=16)
    prefix = numbers(L, 2, 1, G, 37, D, seed=5)
    for layer in range(L):
        cache.start_with(layer, *prefix[layer])
    rows = [Record(bits) for _ in range(3)]
    for row in rows:
        row.forward(prefix[:, :, 0].permute(3, 0, 1, 2, 4), long=True)
    for step in range(90):
        T = dice.choice([1, 1, 1, 1, 5, 16, 17, 40])
        ragged = dice.random() < 0.5 or len({len(row.tokens) for row in rows}) > 1
        new = [dice.randint(0, T) for _ in rows] if ragged and T > 1 else [T] * len(rows)
        new = [n if len(row.tokens) + n <= capacity else 0 for n, row in zip(new, rows, strict=True)]
        piece = numbers(L, 2, len(rows), G, T, D, seed=step) + 2
        cache.begin(T, None if min(new) == T and not ragged else new)
        read = torch.stack([torch.stack(cache.append(layer, *piece[layer])) for layer in range(L)])
        cache.advance()
        for b, row in enumerate(rows):
            fresh = piece[:, :, b, :, : new[b]].permute(3, 0, 1, 2, 4)
            expected = row.forward(list(fresh), long=T > 16)
            assert cache.lengths[b] == len(expected) and cache.coded[b] == row.coded
            if expected:
                ours = read[:, :, b, :, : len(expected)].permute(3, 0, 1, 2, 4)
                torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-5, atol=1e-5)
        if step % 9 == 5:
            lengths = [dice.randint(max(0, n - dice.choice([3, 90])), n) for n in cache.lengths]
            cache.crop(lengths)
            for row, length in zip(rows, lengths, strict=True):
                row.crop(length)
        if step in (30, 60):
            chosen = {30: [2, 0, 0, 1], 60: [3, 1]}[step]
            cache.select(chosen)
            copies = [Record(bits) for _ in chosen]
            for copy, row in zip(copies, chosen, strict=True):
                copy.tokens, copy.coded = list(rows[row].tokens), rows[row].coded
            rows = copies


def test_rejected_drafts_leave_no_trace():
    """Drafts of up to `margin` tokens across the ends of blocks: the cache is the one that never saw them."""
    caches = [QuantizedKVCache(1, 1, 99, 1, 4, torch.float32, "cpu", 8, margin=16) for _ in range(2)]
    text, done, dice = numbers(2, 1, 1, 99, 4).float(), 0, random.Random(0)
    while done < 80:
        reads = []
        for cache, drafts in zip(caches, (0, dice.randint(0, 15)), strict=True):
            wrong = 50 * numbers(2, 1, 1, drafts, 4, seed=done).float()
            piece = torch.cat([text[:, :, :, done : done + 1], wrong], dim=3)
            cache.begin(1 + drafts)
            reads.append(torch.stack(cache.append(0, *piece))[:, :, :, : done + 1])
            cache.advance()
            cache.crop([done + 1])
        assert torch.equal(*reads)
        done += 1
    assert caches[0].coded == caches[1].coded == [64]


def test_memory_is_what_the_tensors_take():
    """Counted from their storages: codes of all blocks but the last, low and scale, and the ring."""
    sizes = (4, 3, 512, 4, 32, torch.float32, "cpu")
    full = KVCache(*sizes).bytes
    for bits, most in ((8, 0.29), (4, 0.17)):
        cache = QuantizedKVCache(*sizes, bits)
        held = {id(one): one for value in vars(cache).values() for one in (value if isinstance(value, list)
                else [value]) if isinstance(one, torch.Tensor)}  # fmt: skip
        assert cache.bytes == sum(one.untyped_storage().nbytes() for one in held.values()) < most * full
        blocks, heads = 15, 4 * 3 * 4
        codes = 2 * heads * blocks * BLOCK * 32 * bits // 8
        ranges = 2 * 2 * (heads * blocks * 32 + 4 * 3 * blocks * BLOCK)
        assert cache.bytes == codes + ranges + 2 * 2 * heads * (BLOCK + 1) * 32


def test_numbers_beyond_fp16_are_cut():
    cache = QuantizedKVCache(1, 1, 40, 1, 2, torch.float32, "cpu", 8)
    for tokens in (34, 1, 1):
        cache.begin(tokens)
        read = torch.stack(cache.append(0, *torch.full((2, 1, 1, tokens, 2), 1e6)))
        assert (read == 65504).all()
        cache.advance()


MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


@pytest.mark.parametrize("name, bits", [("dense", 8), ("dense", 4), ("experts", 8)])
@torch.inference_mode()
def test_the_fast_path_computes_the_same(name, bits):
    """One row, then rows of different lengths of which some rest, in fp64; both write the same codes."""
    shape = {"max_position_embeddings": 128, **(MOE if name == "experts" else {})}
    model = shake(TinySeek(small_config(**shape))).double().eval()
    fast, ids = FastDecoder(model), torch.randint(0, 61, (3, 90), generator=torch.Generator().manual_seed(1))
    for B in (1, 3):
        caches = [make_cache(model, B, 120, kv_cache=f"int{bits}") for _ in range(2)]
        for cache in caches:
            model(ids[:B, :50], cache=cache, new_tokens=None if B == 1 else [50, 2, 31])
        for step in range(20):
            new = None if B == 1 or step % 3 else [1, step % 2, 1]
            tokens = ids[:B, 50 + step]
            expected = model(tokens[:, None], cache=caches[0], new_tokens=new).logits[:, 0]
            logits = fast.step(tokens.tolist(), caches[1], new)[0]
            go = torch.tensor(new or [1] * B).bool()
            torch.testing.assert_close(logits[go], expected[go], rtol=0, atol=1e-4)  # decoded in fp32
        assert caches[0].lengths == caches[1].lengths and caches[0].coded == caches[1].coded
        assert torch.equal(caches[0].codes, caches[1].codes)


@torch.inference_mode()
def test_a_text_is_that_of_the_plain_cache():
    """In 8 bits the model nearly always prefers the same token after the same text; and drafts write the text
    of no drafts."""
    model = shake(TinySeek(small_config(max_position_embeddings=128, mtp="parallel"))).double().eval()
    text = torch.randint(0, 61, (67,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [text[:3], text[3:]]
    greedy = SamplingParams(temperature=0, max_new_tokens=45)
    same = []
    for prompt, answer in zip(prompts, Generator(model).generate(prompts, greedy), strict=True):
        cache, piece = make_cache(model, 1, 128, kv_cache="int8"), prompt
        for token in answer:
            same.append(model(torch.tensor([piece]), cache=cache, last_only=True).logits.argmax() == token)
            piece = [token]
    assert sum(same) / len(same) >= 0.95
    drafting = SpeculativeGenerator(model, 0, 1, kv_cache="int8")
    alone = Generator(model, fast=False, kv_cache="int8")
    for prompt in prompts:
        assert drafting.generate([prompt], greedy) == alone.generate([prompt], greedy)
    assert drafting.drafted > 40


def test_other_caches_are_refused():
    for shape, words in (
        ({"sliding_window": 4}, "a sliding window"), ({"attention_kind": "mla"}, "latent attention"),
    ):  # fmt: skip
        model = TinySeek(small_config(**shape))
        with pytest.raises(UserError, match=f"int4: this model has {words}"):
            Generator(model, kv_cache="int4")
        with pytest.raises(UserError, match=words):
            make_cache(model, 1, 8, kv_cache="int8")
