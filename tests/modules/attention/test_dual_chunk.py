"""Dual chunk attention against the paper's matrix of distances: a loop over every query and key in fp64 turns
each query by its distance to that key. No table, no chunk and no merge of the real code is used."""

import math

import pytest
import torch

from model.caches import make_cache
from model.tinyseek import TinySeek
from modules.attention import dual_chunk
from modules.attention.context import build_context
from modules.attention.dual_chunk import DualChunkAttention, merge, partial_attention, three_positions
from modules.rope_scaling import rope_frequencies
from tests.modules.tools import shake, small_config
from utils.errors import UserError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def chunks(c, w, **more):
    return {"dual_chunk_attention_config": {"chunk_size": c, "local_size": w} | more}


MODELS = {  # strides 4, 3, 5, 2, 1, 4
    "GQA": chunks(6, 2),
    "MHA, bias, interleaved": chunks(5, 2)
    | {"num_key_value_heads": 4, "attention_bias": True, "rope_interleaved": True},
    "MQA, no QK-norm, yarn, interleaved": chunks(8, 3)
    | {"num_key_value_heads": 1, "qk_norm": False, "rope_scaling": YARN, "rope_interleaved": True},
    "window above the stride, yarn": chunks(5, 3) | {"rope_scaling": YARN},
    "stride of one": chunks(3, 2),
    "temperature, bias, partial rotary": chunks(6, 2, original_max_position_embeddings=5)
    | {"attention_bias": True, "partial_rotary_factor": 0.5},
}
PATHS = ["auto", "eager"]


def model_of(name, path="auto"):
    changes = MODELS[name] | {"attn_implementation": path}
    return shake(TinySeek(small_config(**changes)), seed=len(name)).double().eval()


def stride_of(name):
    sizes = MODELS[name]["dual_chunk_attention_config"]
    return sizes["chunk_size"] - sizes["local_size"]


def ids(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def distance(i, j, c, w):
    """M[i][j] of the paper, for j <= i."""
    s = c - w
    if i // s == j // s:
        return i - j
    if i // s - j // s == 1:
        return min(i % s + s, c) - j % s
    return min(2 * s - 1, c) - j % s


def by_the_paper(layer, config, x, first=0):
    """One attention layer on rows whose positions begin at `first`. Pairs of channels are complex numbers."""
    B, T, _ = x.shape
    q, k, v = layer.project(x)
    scaling = (config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    inv_freq, factor = rope_frequencies(*scaling)
    sizes, R, rows = config.dual_chunk_attention_config, config.rotary_dim, []
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    first_of, second_of = slice(0, R // 2), slice(R // 2, R)
    if config.rope_interleaved:
        first_of, second_of = slice(0, R, 2), slice(1, R, 2)
    zq, zk = (torch.complex(part[..., first_of], part[..., second_of]) for part in (q, k))
    for i in range(T):
        scores = []
        for j in range(i + 1):
            far = distance(first + i, first + j, sizes["chunk_size"], sizes["local_size"])
            turn = torch.polar(torch.ones(R // 2, dtype=torch.float64), far * inv_freq.double())
            score = (zq[:, :, i] * turn * zk[:, :, j].conj()).real.sum(-1) * factor**2
            scores.append(score + (q[:, :, i, R:] * k[:, :, j, R:]).sum(-1))  # channels that do not rotate
        scores = torch.stack(scores, dim=-1) * config.head_dim**-0.5  # (B, H, i + 1)
        if "original_max_position_embeddings" in sizes:
            longer = (first + i + 1) / sizes["original_max_position_embeddings"]
            scores = scores * max(1.0, 0.1 * math.log(longer) + 1) ** 2
        rows.append((scores.softmax(-1)[..., None] * v[:, :, : i + 1]).sum(2))
    return layer.o_proj(torch.stack(rows, dim=1).reshape(B, T, -1))  # (B, T, H, D)


def oracle(model, text, first=0):
    """The model's logits with every attention layer replaced by the loop."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.forward = lambda x, *rest, own=attention: by_the_paper(own, model.config, x, first)
    try:
        return model(text).logits
    finally:
        for layer in model.model.layers:
            del layer.self_attn.forward


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_rows(name, path, monkeypatch):
    """Lengths below, at and across the edges of chunks; in pieces of two queries, and of whole chunks."""
    model, s = model_of(name, path), stride_of(name)
    for length in {1, s - 1, s, s + 1, 2 * s, 2 * s + 1, 3 * s + 2, 11} - {0}:
        text = ids(2, length)
        expected = oracle(model, text)
        for block in (2, 256) if path == "auto" else (256,):
            monkeypatch.setattr(dual_chunk, "BLOCK", block)
            same(model(text).logits, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pieces(name, path):
    """Token by token, prompt and decode, prompt in pieces of odd sizes."""
    model, text = model_of(name, path), ids(2, 17)
    expected = oracle(model, text)
    for pieces in ([1] * 17, [9] + [1] * 8, [5, 1, 7, 2, 2], [3, 11, 3]):
        cache = make_cache(model, 2, 17)
        same(torch.cat([model(part, cache=cache).logits for part in text.split(pieces, 1)], 1), expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ragged_rows_are_each_row_alone(name):
    """Rows of different lengths in one batch, padded on the right, in several rounds, some rows resting."""
    model = model_of(name)
    rounds = [[6, 1, 3], [1, 1, 1], [2, 9, 0], [1, 1, 1], [0, 4, 8]]
    texts = [ids(1, sum(column), seed=b) for b, column in enumerate(zip(*rounds, strict=True))]
    expected = [oracle(model, text)[0] for text in texts]
    cache, done = make_cache(model, 3, 16), [0, 0, 0]
    for new in rounds:
        batch = ids(3, max(new), seed=99)  # padding is any token at all
        for b in range(3):
            batch[b, : new[b]] = texts[b][0, done[b] : done[b] + new[b]]
        logits = model(batch, cache=cache, new_tokens=None if set(new) == {1} else new).logits
        for b in range(3):
            same(logits[b, : new[b]], expected[b][done[b] : done[b] + new[b]])
        done = [a + n for a, n in zip(done, new, strict=True)]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_documents_are_each_document_alone(name):
    """Positions restart with each document, and no document begins at the edge of a chunk of the row."""
    model, lengths = model_of(name), [[3, 9, 2], [13, 1]]  # the last document of the first row is padding
    text = ids(2, 14)
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    documents = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths])
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 12:] = False
    logits = model(text, position_ids=positions, document_ids=documents, padding_mask=mask).logits
    for b, row in enumerate(lengths):
        for d in range(len(row)):
            own = (documents[b] == d) & mask[b]
            if own.any():
                same(logits[b, own], oracle(model, text[b : b + 1, own])[0])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_positions_that_were_given_count(name):
    """Without documents only the triangle is a rule, but the chunks are not where the row's indices say."""
    model, text = model_of(name), ids(2, 9)
    given = torch.arange(7, 16)[None].expand(2, -1)
    expected = oracle(model, text, first=7)
    same(model(text, position_ids=given).logits, expected)
    assert stride_of(name) == 1 or (model(text).logits - expected).abs().max() > 1e-6
    with pytest.raises(ValueError, match="position_ids"):
        model(text, position_ids=given, cache=make_cache(model, 2, 9))


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_a_text_of_one_chunk_is_read_as_usual(path):
    """As without DCA, with the same weights; so are the tokens before the first distance above chunk_size."""
    options = {"rope_scaling": YARN, "attention_bias": True, "attn_implementation": path}
    ours, plain = (
        shake(TinySeek(small_config(**options, **more))).double().eval() for more in (chunks(16, 4), {})
    )
    assert list(ours.state_dict()) == list(plain.state_dict())
    text, cache = ids(2, 12), make_cache(ours, 2, 12)
    same(ours(text).logits, plain(text).logits)
    same(torch.cat([ours(part, cache=cache).logits for part in text.split(1, 1)], 1), plain(text).logits)
    longer = ids(2, 20)
    gap = ours(longer).logits - plain(longer).logits
    assert gap[:, :17].abs().max() < 1e-12 and gap[:, 17:].abs().amax((0, 2)).min() > 1e-6


@pytest.mark.parametrize("c, w", [(6, 2), (16, 4), (9, 1), (5, 3), (3, 2), (2, 1), (8, 4)])
def test_distances(c, w):
    """Those of the paper: at most c, never negative, exact for the nearest w + 1 if w < s."""
    s, T = c - w, 40
    queries = torch.stack(three_positions(torch.arange(T), c, s)).tolist()
    for i in range(T):
        for j in range(i + 1):
            ours = queries[min(i // s - j // s, 2)][i] - j % s
            assert ours == distance(i, j, c, w) and 0 <= ours <= c
            if i // s == j // s or (w < s and i - j <= w + 1):
                assert ours == i - j


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name, monkeypatch):
    """Of every weight, through both paths and through the loop."""
    monkeypatch.setattr(dual_chunk, "BLOCK", 3)
    text, weights = ids(2, 13), torch.randn(2, 13, 61, dtype=torch.float64)

    def gradients(path, run):
        model = model_of(name, path)
        (run(model) * weights).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients("auto", lambda model: oracle(model, text))
    for path in PATHS:
        for ours, slow in zip(gradients(path, lambda model: model(text).logits), expected, strict=True):
            torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("size", [1.0, 300.0, 3e4])
def test_merging_huge_scores(size):
    """Three sets of keys, scores up to 1e10, whose exponentials overflow: equal to one softmax in fp64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8) * size for heads, n in ((4, 3), (2, 10), (2, 10)))
    parts = [
        partial_attention(q, k[:, :, keys], v[:, :, keys], 1.0, 0.0, causal=False)
        for keys in (slice(6, 10), slice(2, 6), slice(0, 2))
    ]
    keys, values = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = (q.double() @ keys.double().mT).float()  # as exact as fp32 can be
    expected = scores.double().softmax(-1) @ values.double()
    clear = scores.topk(2).values.diff().abs() > 1e-5 * scores.abs().amax(-1, keepdim=True)  # (B, H, T, 1)
    assert clear.double().mean() > 0.9 and merge(parts).isfinite().all()
    error = (merge(parts) - expected)[clear.expand_as(expected)].abs().max()
    assert error < 1e-4 * size
    far = [(torch.ones(1), torch.tensor([1e4])), (torch.zeros(1), torch.tensor([1e4 - math.log(3)]))]
    torch.testing.assert_close(merge(far), torch.tensor([0.75]), rtol=0, atol=1e-3)  # 1e4 has 1e-3 in fp32
    lost = [(torch.ones(1), torch.tensor([1e4])), (torch.zeros(1), torch.tensor([-1e4]))]
    assert merge(lost) == 1


def test_merging_in_half_precision():
    """Three keys of value 1 and four of value 0 with equal scores of 32, near which bf16 has steps of 0.25:
    an LSE in bf16 would give 0.38 in place of 3/7."""
    q, k, v = (torch.full((1, 1, n, 4), value, dtype=torch.bfloat16) for n, value in ((1, 4), (7, 2), (7, 1)))
    v[:, :, 3:] = 0
    parts = [
        partial_attention(q, k[:, :, keys], v[:, :, keys], 1.0, 0.0, causal=False)
        for keys in (slice(0, 3), slice(3, 7))
    ]
    assert (merge(parts) - 3 / 7).abs().max() < 2**-9  # half a step at 1


@pytest.mark.parametrize("path", PATHS)
def test_dropout_drops_weights_in_training(path, monkeypatch):
    """With the identity as values the output is the weights: a share p of them is zero, the others are scaled
    by 1/(1-p), whichever of the three attentions they come from."""
    monkeypatch.setattr(dual_chunk, "BLOCK", 20)
    torch.manual_seed(0)
    T, p = 64, 0.25
    config = small_config(**MODELS["GQA"], attention_dropout=p, attn_implementation=path)
    layer, context = DualChunkAttention(config, 0), build_context(T, "cpu")
    rotary = TinySeek(config).model.rotary_emb(context.positions)
    q, k, v = torch.randn(1, 4, T, 8), torch.randn(1, 2, T, 8), torch.eye(T).expand(1, 2, T, T)

    def weights():
        if path == "auto":
            return layer.by_chunks(q, k, v, rotary)
        return layer.at_once(q, k, v, rotary, context, context.positions)

    layer.eval()
    whole, seen = weights(), torch.ones(T, T, dtype=torch.bool).tril().expand(1, 4, T, T)
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 4, T))
    layer.train()
    dropped = weights()
    assert not dropped[~seen].any()
    share = (dropped[seen] == 0).double().mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / seen.sum()) ** 0.5
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (whole / (1 - p))[kept])


def test_scores_are_never_all_there(monkeypatch):
    """At most BLOCK queries, or those of one chunk, at a time; never more keys than the past."""
    sizes, real = [], dual_chunk.scores_of

    def watched(q, k, scale):
        sizes.append((q.shape[2], k.shape[2]))
        return real(q, k, scale)

    monkeypatch.setattr(dual_chunk, "scores_of", watched)
    model = TinySeek(small_config(**chunks(50, 10), num_hidden_layers=1, max_position_embeddings=400))
    for block, most in ((256, 40), (32, 32)):
        monkeypatch.setattr(dual_chunk, "BLOCK", block)
        sizes.clear()
        model(ids(1, 400))
        assert max(queries for queries, _ in sizes) == most
        computed = sum(queries * keys for queries, keys in sizes)
        assert 400 * 401 / 2 <= computed <= 400 * (401 + most) / 2
    model.model.layers[0].self_attn.implementation = "eager"
    sizes.clear()
    model(ids(1, 400))
    assert sizes == [(400, 400)] * 3  # the formula: three products, from which scores are selected


@torch.no_grad()
def test_half_precision():
    """Merging three attentions loses no more than one softmax does; keys under autocast fit the cache."""
    texts, errors = ids(4, 40), {}
    for path in PATHS:
        model = shake(TinySeek(small_config(**chunks(6, 2), attn_implementation=path)), scale=0.3).eval()
        exact = model.double()(texts).logits
        rounded = model.bfloat16()(texts).logits
        errors[path] = (rounded - exact).square().mean().sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            cache = make_cache(model.float(), 4, 40)
            assert (model(texts, cache=cache).logits - exact).abs().max() < 1
    assert errors["auto"] < 1.2 * errors["eager"]


MISTAKES = {
    "chunk_size must be a whole number above 0, not None": {"local_size": 2},
    "local_size must be a whole number above 0, not 0": {"chunk_size": 6, "local_size": 0},
    "chunk_size must be a whole number above 0, not True": {"chunk_size": True, "local_size": 1},
    "local_size must be a whole number above 0, not 2.0": {"chunk_size": 6, "local_size": 2.0},
    "original_max_position_embeddings must be .* not -1": {
        "chunk_size": 6, "local_size": 2, "original_max_position_embeddings": -1,
    },
    "local_size=6 must be below chunk_size=6": {"chunk_size": 6, "local_size": 6},
    "does not take stride; it takes chunk_size, local_size": {"chunk_size": 6, "local_size": 2, "stride": 4},
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_a_bad_setting_is_one_clear_line(words):
    with pytest.raises(UserError, match=f"^model.dual_chunk_attention_config:? {words}"):
        small_config(dual_chunk_attention_config=MISTAKES[words])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sliding_window": 4}, "model.sliding_window=4 .*set one to null"),
        ({"attention_kind": "mla"}, "model.dual_chunk_attention_config needs model.attention_kind=gqa"),
        ({"attn_implementation": "sdpa"}, "attn_implementation=auto .*not sdpa"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling that ignores the length"),
    ],
)
def test_what_does_not_go_together(changes, words):
    with pytest.raises(UserError, match=words):
        TinySeek(small_config(**chunks(6, 2), **changes))
    TinySeek(small_config(**chunks(6, 2, original_max_position_embeddings=None)))  # as in a JSON of Qwen's
