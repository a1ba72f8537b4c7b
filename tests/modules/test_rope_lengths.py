"""Rules that depend on the length of a row (dynamic NTK, LongRoPE): caches, padding, packed documents.

With a cache they read the length that a row is planned to reach, without one the row's own. So a cached row
equals the forward over its whole text, ours in fp64 and Hugging Face's, which rotates in fp32.
"""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from inference.generation.speculative import draft
from model.caches import make_cache, make_draft_cache
from model.tinyseek import TinySeek
from modules.adapters.prefix import PrefixEncoder
from modules.attention.rolling_cache import RollingKVCache
from modules.rope import RotaryEmbedding
from tests.model import test_moe_model, test_tinyseek
from tests.modules.tools import shake, small_config

TRAINED = 8
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": TRAINED}


def longrope(pairs):
    """Two lists that differ in every number."""
    short, long = torch.rand(2, pairs, generator=torch.Generator().manual_seed(pairs)) * 2 + 0.5
    return {
        "rope_type": "longrope", "short_factor": short.tolist(), "long_factor": (4 * long).tolist(),
        "original_max_position_embeddings": TRAINED, "factor": 4.0,
    }  # fmt: skip


MODELS = {
    "GQA, dynamic": {"rope_scaling": DYNAMIC},
    "GQA, longrope": {"rope_scaling": longrope(4), "num_key_value_heads": 1},
    "MLA, dynamic": {"rope_scaling": DYNAMIC},
    "MLA, longrope": {"rope_scaling": longrope(3), "q_lora_rank": 5},
}
LENGTHS = [5, 9, 14, 8]  # within the trained length, beyond it, and at its end
PIECES = {
    "token by token": [[1, 1, 1, 1]] * 5 + [[0, 1, 1, 1]] * 3 + [[0, 1, 1, 0]] + [[0, 0, 1, 0]] * 5,
    "whole": [LENGTHS],
    "prompt in two pieces, then tokens": [[4, 3, 2, 6], [1, 1, 9, 1], [0, 1, 1, 1], *[[0, 1, 1, 0]] * 2,
                                          [0, 2, 0, 0]],
}  # fmt: skip


def twins(name):
    """Our model and Hugging Face's in fp64. Its `dynamic` takes the model's length for the trained one."""
    changes = {"max_position_embeddings": TRAINED} if "dynamic" in name else {}
    changes |= MODELS[name]
    if name.startswith("GQA"):
        return test_tinyseek.twins(torch.float64, **changes)
    return test_moe_model.twins("DeepseekV3", torch.float64, rope_interleaved=True, **changes)


def texts(lengths=LENGTHS):
    return [test_tinyseek.text(1, length, seed=length) for length in lengths]


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def batch_of(rows, width=None):
    """Rows of different lengths as one batch, filled with other tokens."""
    batch = test_tinyseek.text(len(rows), width or max(row.shape[1] for row in rows), seed=99)
    for b, row in enumerate(rows):
        batch[b, : row.shape[1]] = row[0]
    return batch


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cached_is_uncached_is_hugging_faces(name):
    """Ragged rows on both sides of the trained length, however the text arrives."""
    ours, theirs = twins(name)
    expected = [ours(text).logits[0] for text in texts()]
    for b in sorted(range(4), key=LENGTHS.__getitem__):  # theirs would keep the base of a longer text
        torch.testing.assert_close(expected[b], theirs(texts()[b]).logits[0], rtol=0, atol=1e-5)
    base = ours.model.rotary_emb
    assert not torch.equal(base(torch.arange(14)[None])[0][:, :8], base(torch.arange(8)[None])[0])
    for news in PIECES.values():
        cache, parts, done = make_cache(ours, 4, 20, LENGTHS), [[] for _ in LENGTHS], [0] * 4
        for new in news:
            rows = [text[:, at : at + n] for text, at, n in zip(texts(), done, new, strict=True)]
            logits = ours(batch_of(rows), cache=cache, new_tokens=new).logits
            for b, n in enumerate(new):
                parts[b].append(logits[b, :n])
            done = [at + n for at, n in zip(done, new, strict=True)]
        assert done == LENGTHS
        for b in range(4):
            same(torch.cat(parts[b]), expected[b])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equal_rows_with_different_plans(name):
    """One position table for all rows, but each row has its own frequencies. By default the plan is the
    capacity."""
    ours, _ = twins(name)
    text = test_tinyseek.text(1, 14)
    short, long = ours(text[:, :6]).logits[0], ours(text).logits[0, :6]
    assert (short - long).abs().max() > 1e-3
    cache = make_cache(ours, 2, 14, [6, 14])
    parts = [ours(piece.expand(2, -1), cache=cache).logits for piece in text[:, :6].split(2, dim=1)]
    same(torch.cat(parts, dim=1), torch.stack([short, long]))
    same(ours(text[:, :6], cache=make_cache(ours, 1, 14)).logits[0], long)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_does_not_count(name):
    ours, _ = twins(name)
    mask = torch.arange(14) < torch.tensor(LENGTHS)[:, None]
    logits = ours(batch_of(texts()), padding_mask=mask).logits
    for b, text in enumerate(texts()):
        same(logits[b, mask[b]], ours(text).logits[0])


@torch.no_grad()
def test_packed_documents_count_the_longest_position():
    """As in Hugging Face's module, for one row; and each row its own."""
    config = LlamaConfig(head_dim=8, hidden_size=24, num_attention_heads=4, max_position_embeddings=TRAINED)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, *range(2, 6)], [0, 1, 5, 9, 3, 30]])
    ours = RotaryEmbedding(8, 1e4, DYNAMIC, 64)(positions)
    for b in range(3):
        theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[b : b + 1])
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a[b : b + 1], e, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_window_and_a_prefix():
    """A ring has no end, so it takes the plan from `make_cache`; a prefix counts."""
    config = small_config(rope_scaling=DYNAMIC, sliding_window=3)
    model, text = shake(TinySeek(config)).double().eval(), test_tinyseek.text(2, 14)
    cache = make_cache(model, 2, 14)
    assert type(cache) is RollingKVCache
    parts = [model(piece, cache=cache).logits for piece in text.split([5, 1, 8], dim=1)]
    same(torch.cat(parts, dim=1), model(text).logits)
    ring = RollingKVCache(2, 2, 3, 2, 8, torch.float64, "cpu")
    with pytest.raises(ValueError, match="planned"):
        model(text, cache=ring)
    plain = shake(TinySeek(small_config(sliding_window=3))).double().eval()
    ring = RollingKVCache(2, 2, 3, 2, 8, torch.float64, "cpu")
    same(plain(text, cache=ring).logits, plain(text).logits)  # no rule depends on the length

    model = shake(TinySeek(small_config(rope_scaling=longrope(4)))).double().eval()
    model.prefix = PrefixEncoder(*torch.randn(2, 2, 2, 4, 8)).double()
    for length in (4, 5):  # with the 4 of the prefix, up to the trained length and beyond
        cache = make_cache(model, 2, length)
        parts = [model(piece, cache=cache).logits for piece in text[:, :length].split(1, dim=1)]
        same(torch.cat(parts, dim=1), model(text[:, :length]).logits)


@pytest.mark.parametrize("prefix", [0, 4])
@torch.no_grad()
def test_drafts_are_made_for_the_same_length(prefix):
    """The MTP layer of a forward over the whole text, and the same layer with its own cache. With the prefix
    the trunk's rows are longer than trained, although the text is not."""
    config = small_config(rope_scaling=longrope(4), mtp="sequential")
    model, text = shake(TinySeek(config)).double().eval(), test_tinyseek.text(1, 12 - 2 * prefix + 3)
    if prefix:
        model.prefix = PrefixEncoder(*torch.randn(2, 2, 2, prefix, 8)).double()
    decoded = model.model(text, prefix=model.prefix)
    following, context = model.model.embed_tokens(text.roll(-1, 1)), decoded.context.without_prefix(prefix)
    expected, _ = model.mtp(decoded.hidden, following, context, decoded.rotary)
    cache, parts = make_draft_cache(model, 1, text.shape[1]), []
    for at, piece in zip((0, 5, 6), decoded.hidden.split([5, 1, text.shape[1] - 6], dim=1), strict=True):
        ids = text.roll(-1, 1)[:, at : at + piece.shape[1]]
        parts.append(draft(model, piece, ids, cache)[1])
    same(torch.cat(parts, dim=1), expected)
