"""Caches: generation with one equals generation without, however the text arrives. The oracle is the model
itself without a cache, in fp64 and row by row; that one is proven against Hugging Face in
tests/model/test_tinyseek.py."""

import random

import pytest
import torch

from model.caches import make_cache, make_draft_cache
from model.tinyseek import TinySeek
from modules.attention.grouped_query import eager_attention
from modules.attention.context import build_context
from modules.attention.cache import KVCache
from modules.attention.hybrid_cache import HybridCache
from modules.attention.rolling_cache import RollingKVCache
from tests.modules.tools import shake, slow_attention, small_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
MODELS = {
    "GQA": {},
    "MHA, bias, interleaved": {"num_key_value_heads": 4, "attention_bias": True, "rope_interleaved": True},
    "MQA, no QK-norm, yarn": {"num_key_value_heads": 1, "qk_norm": False, "rope_scaling": YARN},
    "one head, eager, soft cap": {
        "num_attention_heads": 1, "num_key_value_heads": 1, "attn_implementation": "eager",
        "final_logit_softcapping": 3.0,
    },
    "dual chunks": {"dual_chunk_attention_config": {"chunk_size": 9, "local_size": 2}},
    "window of 1": {"sliding_window": 1, "attention_bias": True},
    "window of 3": {"sliding_window": 3, "num_key_value_heads": 1, "rope_interleaved": True},
    "window of 3, eager": {"sliding_window": 3, "attn_implementation": "eager", "rope_scaling": YARN},
    "window of 20": {"sliding_window": 20, "qk_norm": False},
    "window larger than the text": {"sliding_window": 500},
    "window of 2, sinks": {"sliding_window": 2, "attention_sinks": 3},
    "pattern": {"sliding_window": 3, "sliding_window_pattern": 2, "num_hidden_layers": 3},
    "types of layers": {
        "sliding_window": 3, "num_hidden_layers": 3, "attention_sinks": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "pattern, sinks, eager": {
        "sliding_window": 4, "sliding_window_pattern": 3, "attention_sinks": 2, "num_hidden_layers": 4,
        "attn_implementation": "eager", "rope_scaling": YARN,
    },
}  # fmt: skip


def model_of(name):
    return shake(TinySeek(small_config(**MODELS[name])), seed=len(name)).double().eval()


def ids(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def caches(model, B, capacity):
    """The model's own cache, and with a window also rings with little room, whose slots are reused at
    once."""
    yield make_cache(model, B, capacity)
    config = model.config
    if config.sliding_window is not None:
        shape = (config.num_key_value_heads, config.head_dim, torch.float64, "cpu")
        layers, window, sinks = config.num_hidden_layers, config.sliding_window, config.attention_sinks
        for margin in (1, 3):
            every, kinds = config.sliding_window_pattern, config.layer_types
            if every or kinds:
                local = [bool((layer + 1) % every) for layer in range(layers)] if every else []
                local = local or [kind == "sliding_attention" for kind in kinds]
                yield HybridCache(local, B, capacity, window, *shape, margin=margin, sinks=sinks)
            else:
                yield RollingKVCache(layers, B, window, *shape, margin=margin, sinks=sinks)
        yield KVCache(layers, B, capacity, *shape)  # keeps all, and the mask narrows


def margin_of(cache):
    """How many tokens the cache surely takes back: a ring as many as its margin."""
    return getattr(getattr(cache, "local", cache), "margin", 99)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [[1] * 27, [9] + [1] * 18, [5, 1, 7, 2, 2, 10], [27], [20, 7]], ids=str)
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(name, pieces):
    """Token by token, prompt and decode, prompt in chunks."""
    model, text = model_of(name), ids(2, 27)
    expected = model(text).logits
    for cache in caches(model, 2, 27):
        taken = cache.bytes
        parts = [model(part, cache=cache).logits for part in text.split(pieces, dim=1)]
        same(torch.cat(parts, dim=1), expected)
        assert cache.lengths == [27, 27] and cache.bytes == taken


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ragged_rows_are_each_row_alone(name):
    """Rows of different lengths in one batch, padded on the right, in several rounds, some rows resting."""
    model = model_of(name)
    rounds = [[6, 1, 3], [1, 1, 1], [2, 9, 0], [1, 1, 1], [0, 4, 19], [1, 1, 1]]
    totals = [sum(column) for column in zip(*rounds, strict=True)]
    texts = [ids(1, total, seed=b) for b, total in enumerate(totals)]
    expected = [model(text).logits[0] for text in texts]
    for cache in caches(model, 3, max(totals)):  # no room to spare: padding takes none
        done = [0, 0, 0]
        for new in rounds:
            batch = ids(3, max(new), seed=99)  # padding is any token at all
            for b in range(3):
                batch[b, : new[b]] = texts[b][0, done[b] : done[b] + new[b]]
            lengths = None if set(new) == {1} else new
            before = list(cache.lengths)
            logits = model(batch, cache=cache, new_tokens=lengths).logits
            for b in range(3):
                same(logits[b, : new[b]], expected[b][done[b] : done[b] + new[b]])
            done = [a + n for a, n in zip(done, new, strict=True)]
            assert cache.lengths == done
            if min(new) > 0 and max(new) <= margin_of(cache):
                cache.crop(before)  # the same round again, for the last token only
                last = model(batch, cache=cache, new_tokens=lengths, last_only=True).logits
                for b in range(3):
                    same(last[b, 0], expected[b][done[b] - 1])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_text_is_the_same(name):
    model, prompt = model_of(name), ids(2, 4, seed=5)
    plain = prompt
    for _ in range(24):
        plain = torch.cat([plain, model(plain, last_only=True).logits.argmax(-1)], dim=1)
    for cache in caches(model, 2, 28):
        text, piece = prompt, prompt
        for _ in range(24):
            piece = model(piece, cache=cache, last_only=True).logits.argmax(-1)
            text = torch.cat([text, piece], dim=1)
        assert torch.equal(text, plain)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rejected_drafts_leave_no_trace(name):
    """Drafts of random sizes are written, looked at, and cropped again, by a different number in every
    row."""
    model, text = model_of(name), ids(2, 40, seed=7)
    expected = model(text).logits
    for cache in caches(model, 2, 50):
        most = min(8, margin_of(cache))
        dice, done = random.Random(len(name)), [0, 0]
        while min(done) < 30:
            size = dice.randint(1, most)
            good = [
                dice.randint(0, min(size, 40 - d)) for d in done
            ]  # of the draft, so many tokens are right
            draft = ids(2, size, seed=dice.randint(0, 999))
            for b in range(2):
                draft[b, : good[b]] = text[b, done[b] : done[b] + good[b]]
            logits = model(draft, cache=cache).logits
            for b in range(2):
                same(logits[b, : good[b]], expected[b, done[b] : done[b] + good[b]])
            done = [d + g for d, g in zip(done, good, strict=True)]
            cache.crop(done)
            assert cache.lengths == done


@torch.no_grad()
def test_a_ring_refuses_to_forget_what_it_has_overwritten():
    """Two crops in a row add up: each alone is within the margin, together they reach tokens that are
    gone."""
    cache = RollingKVCache(1, 1, 4, 1, 2, torch.float32, "cpu", margin=3)
    for _ in range(20):
        cache.begin(1)
        cache.append(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        cache.advance()
    cache.crop([18])
    with pytest.raises(ValueError, match="crop it to 17"):
        cache.crop([16])
    cache.crop([17])
    assert cache.lengths == [17]
    with pytest.raises(ValueError, match="holds 17"):
        cache.crop([18])


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_ring_that_has_overwritten_nothing_can_forget_all(sinks):
    for tokens, refused in ((sinks + 6, False), (sinks + 7, True)):  # W - 1 + margin = 6
        cache = RollingKVCache(1, 1, 4, 1, 2, torch.float32, "cpu", margin=3, sinks=sinks)
        cache.begin(tokens)
        cache.advance()
        if refused:
            with pytest.raises(ValueError, match=f"has held {tokens} tokens: crop it to {tokens - 3}"):
                cache.crop([tokens - 4])
            assert cache.lengths == [tokens]
            tokens = 3
        cache.crop([cache.lengths[0] - tokens])
        assert (cache.held >= 0).sum() == (sinks + 3 if refused else 0)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 3])
def test_memory_of_a_ring_does_not_grow(sinks):
    cache = RollingKVCache(2, 1, 5, 1, 4, torch.float32, "cpu", margin=2, sinks=sinks)
    taken, address = cache.bytes, cache.store.data_ptr()
    assert taken == 2 * 2 * (sinks + 5 - 1 + 2) * 4 * 4
    for tokens in (3, 50, 1, 1, 200):
        cache.begin(tokens)
        for layer in range(2):
            cache.append(layer, torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4))
        cache.advance()
        written = cache._slot.tolist()  # no slot twice: on a GPU it would be open which of the two stays
        assert len(set(written)) == len(written)
    assert cache.lengths == [255] and cache.bytes == taken and cache.store.data_ptr() == address
    model = TinySeek(small_config(sliding_window=4, attention_sinks=sinks))
    assert make_cache(model, 1, 10_000_000).bytes < 100_000
    assert type(make_cache(model, 1, 4 + sinks)) is KVCache  # never needs to forget
    assert type(make_cache(model, 1, 5 + sinks)) is RollingKVCache


@torch.no_grad()
def test_memory_of_a_pattern_grows_with_its_global_layers():
    """Counted from the tensors that a text has filled: 2 of 5 layers are global, and 3 stay as they are."""
    shape = {"sliding_window": 4, "sliding_window_pattern": 2, "attention_sinks": 2, "num_hidden_layers": 5}
    model, per_token = TinySeek(small_config(**shape)).eval(), 2 * 2 * 8 * 4  # keys, values; G; D; fp32
    for tokens in (40, 400):
        cache = make_cache(model, 1, tokens)
        for piece in ids(1, tokens).split([tokens - 20, *[1] * 20], dim=1):
            model(piece, cache=cache)
        filled = [part.store.any(dim=(1, 2, 3, 5)).sum(dim=1) for part in (cache, cache.local)]
        assert [layer.tolist() for layer in filled] == [[tokens] * 2, [2 + 4 - 1 + 16] * 3]
        assert cache.bytes == (2 * tokens + 3 * (2 + 4 - 1 + 16)) * per_token
        assert cache.lengths == cache.local.lengths == [tokens]
    model = TinySeek(small_config(**shape, mtp="sequential"))
    assert type(make_draft_cache(model, 1, 400)) is KVCache  # the second head sees all
    assert type(make_cache(model, 1, 6)) is KVCache and type(make_cache(model, 1, 7)) is HybridCache


@torch.no_grad()
def test_a_hybrid_cache_that_refuses_has_changed_nothing():
    shape = {"sliding_window": 2, "sliding_window_pattern": 2}
    model, text = shake(TinySeek(small_config(**shape))).double().eval(), ids(1, 40)
    cache = make_cache(model, 1, 40)
    model(text[:, :30], cache=cache)
    with pytest.raises(ValueError, match="holds 40 tokens"):
        model(text, cache=cache)  # would take every slot of the ring
    with pytest.raises(ValueError, match="crop it to 14"):
        cache.crop([13])
    with pytest.raises(ValueError, match="prefix"):
        make_cache(model, 1, 40).start_with(0, *torch.zeros(2, 1, 2, 3, 8))
    assert cache.lengths == cache.local.lengths == [30]
    same(model(text[:, 30:], cache=cache).logits, model(text).logits[:, 30:])


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_prefix_is_keys_and_values_in_front(rows):
    """Against a loop that concatenates by hand."""
    torch.manual_seed(0)
    B, H, G, D, P, T = 2, 4, 2, 8, 3, 5
    prefix = torch.randn(2, rows, G, P, D, dtype=torch.float64)
    q, k, v = (torch.randn(B, n, T, D, dtype=torch.float64) for n in (H, G, G))
    cache = KVCache(2, B, P + T, G, D, torch.float64, "cpu")
    for layer in range(2):
        cache.start_with(layer, *prefix)
    assert cache.lengths == [P, P]
    got = []
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        cache.begin(part.stop - part.start)
        context = build_context(part.stop - part.start, "cpu", cache=cache)
        assert context.positions.tolist() == [list(range(P + part.start, P + part.stop))]
        for layer in range(2):
            keys, values = cache.append(layer, k[:, :, part], v[:, :, part])
        got.append(eager_attention(q[:, :, part], keys, values, context, 0.3))
        cache.advance()
    all_keys, all_values = (
        torch.cat([front.expand(B, -1, -1, -1), tail], dim=2)
        for front, tail in zip(prefix, (k, v), strict=True)
    )
    same(torch.cat(got, dim=2), slow_attention(q, all_keys, all_values, lambda b, t, s: s <= P + t, 0.3))


@torch.no_grad()
def test_a_prefix_taken_from_a_text_continues_it():
    """Keys and values of a text's first tokens, put in front of its rest, give the logits of the whole
    text."""
    model, text = model_of("GQA"), ids(2, 12)
    first = make_cache(model, 2, 5)
    model(text[:, :5], cache=first)
    cache = make_cache(model, 2, 12)
    for layer in range(2):
        cache.start_with(layer, *first.store[layer])
    same(model(text[:, 5:], cache=cache).logits, model(text).logits[:, 5:])


@torch.no_grad()
def test_what_does_not_fit_is_said():
    model = model_of("GQA")
    cache = make_cache(model, 2, 6)
    with pytest.raises(ValueError, match="holds 6 tokens"):
        model(ids(2, 7), cache=cache)
    model(ids(2, 5), cache=cache)
    with pytest.raises(ValueError, match="larger capacity"):
        model(ids(2, 2), cache=cache)
    assert cache.lengths == [5, 5]  # an attempt that was refused changed nothing
    model(ids(2, 1), cache=cache)
    cache.crop([6, 2])
    model(ids(2, 4), cache=cache, new_tokens=[0, 4])  # fits: padding takes no room
    for bad in ([1], [1, 5], [-1, 1]):
        with pytest.raises(ValueError, match="new_tokens"):
            cache.begin(4, bad)
    for bad in ([7, 0], [-1, 0]):
        with pytest.raises(ValueError, match="cropped"):
            cache.crop(bad)
    pieces = torch.zeros(1, 2, 7, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="already holds"):
        cache.start_with(0, pieces[:, :, :2], pieces[:, :, :2])
    cache.crop([2, 2])  # text as long as the prefix must not be overwritten either
    with pytest.raises(ValueError, match="already holds"):
        cache.start_with(0, pieces[:, :, :2], pieces[:, :, :2])
    with pytest.raises(ValueError, match="does not fit"):
        make_cache(model, 1, 6).start_with(0, pieces, pieces)
    ring = RollingKVCache(1, 1, 3, 2, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="prefix"):
        ring.start_with(0, pieces, pieces)


@torch.no_grad()
def test_half_precision_model_and_autocast():
    """The cache takes the dtype of the model; under autocast the keys of fp32 weights come in bf16 and are
    still taken."""
    text = ids(2, 9)
    for cast, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        for name in ("GQA", "window of 3"):
            model = shake(TinySeek(small_config(**MODELS[name])), scale=0.2).to(cast).eval()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                cache = make_cache(model, 2, 9)
                whole = model(text).logits.float()
                parts = []
                for piece, new in zip(text.split([4, 1, 4], dim=1), (None, [1, 1], None), strict=True):
                    parts.append(model(piece, cache=cache, new_tokens=new).logits)
                torch.testing.assert_close(torch.cat(parts, dim=1).float(), whole, rtol=0.1, atol=0.1)
