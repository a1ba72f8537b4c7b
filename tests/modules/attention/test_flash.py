"""Flash attention against softmax over whole rows in fp64, and what it holds in memory."""

from dataclasses import fields

import pytest
import torch

from model.caches import make_cache
from model.tinyseek import TinySeek
from modules.attention import flash
from modules.attention.cache import KVCache
from modules.attention.context import Rules, build_context
from modules.attention.flash import flash_attention, flash_with_lse
from modules.attention.grouped_query import eager_attention
from modules.attention.rolling_cache import RollingKVCache
from tests.modules.attention.test_grouped_query import RULES, make_context
from tests.modules.tools import shake, small_config
from tests.utils.test_activations import peak_of

SCALE = 0.37


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 queries and 3 keys, so that a few tokens cross edges of both."""
    monkeypatch.setattr(flash, "QUERIES", 4)
    monkeypatch.setattr(flash, "KEYS", 3)


def inputs(B, H, G, T, S, dtype=torch.float64, seed=0):
    """q, k and v, with values wider than keys, and a gradient of the output."""
    torch.manual_seed(seed)
    shapes = (B, H, T, 4), (B, G, S, 4), (B, G, S, 6)
    leaves = (torch.randn(x, dtype=dtype, requires_grad=True) for x in shapes)
    return *leaves, torch.randn(B, H, T, 6, dtype=dtype)


def naive(q, k, v, mask, kept=None):
    """Softmax over whole rows, and the log of its sum; `kept` multiplies the weights, as dropout does.

    mask: bool, anything that broadcasts to (B, H, T, S). Rows without a key give 0 and -inf.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (SCALE * q @ k.mT).masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp_min(-1e300)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    probs = weights / torch.where(total > 0, total, 1)
    return (probs if kept is None else probs * kept) @ v, (top + total.log())[..., 0]


def assert_same(ours, expected, leaves, upstream):
    """The same output and the same gradients, to 1e-12."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(x, leaves, upstream) for x in (ours, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 4, 13])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_forward_and_backward_are_those_of_whole_rows(rules, tokens, groups, small_tiles):
    """One token, a full tile of keys, of queries, and three of each with an odd rest."""
    context, allowed = make_context(tokens, rules)
    each = range(tokens)
    mask = torch.tensor([[[allowed(b, q, k) for k in each] for q in each] for b in (0, 1)])
    *qkv, upstream = inputs(2, 4, groups, tokens, tokens)
    assert_same(flash_attention(*qkv, context, SCALE), naive(*qkv, mask[:, None])[0], qkv, upstream)


@pytest.mark.parametrize("new", [[5, 5], [5, 2], [1, 0]])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("past", [[7, 7], [2, 9]])
def test_new_tokens_after_a_past(past, window, new, small_tiles):
    """More keys than queries, rows that differ in length, keys in the order of a ring, padding, gaps."""
    kind = (KVCache, 20) if window is None else (RollingKVCache, window)
    cache = kind[0](1, 2, kind[1], 1, 4, torch.float64, "cpu")
    for pieces in ([max(past)] * 2 if past[0] == past[1] else past, new):
        cache.begin(max(pieces), None if pieces[0] == pieces[1] else pieces)
        cache.append(0, *torch.zeros(2, 2, 1, max(pieces), 4))
        context = build_context(max(pieces), "cpu", window=window, cache=cache)
        keys = cache.key_index.expand(2, -1).tolist()
        cache.advance()

    def allowed(b, t, key):
        query = past[b] + t
        return t >= new[b] or (0 <= key <= query and (window is None or key > query - window))

    mask = torch.tensor([[[allowed(b, t, key) for key in keys[b]] for t in range(max(new))] for b in (0, 1)])
    *qkv, upstream = inputs(2, 4, 2, max(new), len(keys[0]))
    assert_same(flash_attention(*qkv, context, SCALE), naive(*qkv, mask[:, None])[0], qkv, upstream)


def all_rules(seed):
    """Every rule at random: prefix, window, documents, padding on both sides, queries without a key."""
    generator = torch.Generator().manual_seed(seed)
    T, S, B = 17, 23, 2
    pick = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    some = lambda x: x if pick(2) else None  # noqa: E731
    documents = some(torch.stack([pick(4, T).sort()[0], pick(4, T)]))
    key_documents = None if documents is None else torch.stack([pick(4, S).sort()[0], pick(4, S)])
    return Rules(
        query_index=torch.arange(T)[None] + pick(8, B, 1) - 2,  # below 0: sees no key if causal
        key_index=torch.where(pick(5, B, S) == 0, -1, torch.arange(S)), causal=bool(pick(2)),
        window=some(1 + pick(9).item()), prefix=pick(3).item(), sinks=some(pick(6, B, S) == 0),
        query_documents=documents,
        key_documents=key_documents, real_queries=some(torch.arange(T) >= pick(T, B, 1)),
        real_keys=some(torch.arange(S) < pick(S, B, 1)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_leaves_out_only_tiles_that_nobody_may_see(seed, small_tiles):
    """For every rule at once, and the result is that of the whole mask, rows without a key included."""
    rules = all_rules(seed)
    left = rules.tile().clone()
    for block, tiles in flash.plan(rules):
        for tile in tiles:
            left[:, block, tile] = False
    assert not left.any()
    *qkv, upstream = inputs(2, 2, 1, *rules.tile().shape[1:])
    out, lse = flash_with_lse(*qkv, rules, SCALE)
    expected = naive(*qkv, rules.tile()[:, None])
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-12)
    assert_same(out, expected[0], qkv, upstream)


def test_the_plan_knows_every_rule():
    """A rule that widens what is seen, and that `plan` does not know, would be cut off at the tiles."""
    assert {field.name for field in fields(Rules) if field.init} == {
        "query_index", "key_index", "causal", "window", "prefix", "sinks", "query_documents",
        "key_documents", "real_queries", "real_keys",
    }  # fmt: skip


@pytest.mark.parametrize("rules, row", [
    ({}, lambda n: n + 1),  # the triangle
    ({"window": 33}, lambda n: min(n, 2) + 1),  # 33 tokens and a block of 16 touch three tiles
    ({"document_ids": torch.arange(128)[None] // 32}, lambda n: n % 2 + 1),
    ({"causal": False}, lambda n: 8),
])  # fmt: skip
def test_no_tile_is_computed_that_nobody_may_see(rules, row, monkeypatch):
    """Neither its scores nor its mask; and no mask is larger than a tile. 8 blocks of 16 tokens."""
    monkeypatch.setattr(flash, "QUERIES", 16)
    monkeypatch.setattr(flash, "KEYS", 16)
    seen, tile = [], Rules.tile
    monkeypatch.setattr(Rules, "tile", lambda *args: seen.append(tile(*args)) or seen[-1])
    *qkv, upstream = inputs(1, 2, 1, 128, 128)
    out = flash_attention(*qkv, build_context(128, "cpu", **rules), SCALE)
    assert len(seen) == sum(map(row, range(8)))
    out.backward(upstream)
    assert len(seen) == 2 * sum(map(row, range(8)))
    assert {mask.shape for mask in seen} == {(1, 16, 16)} and all(mask.any() for mask in seen)


def test_queries_without_a_key_give_zeros_and_no_gradient(small_tiles):
    """In a tile with others, and in a tile alone; also with scores that overflow exp."""
    rules = Rules(torch.arange(8)[None] - 5, torch.arange(8)[None])  # the first five queries see nothing
    q, k, v, upstream = inputs(1, 2, 1, 8, 8, torch.float32)
    out, lse = flash_with_lse(q * 1e3, k, v, rules, SCALE)
    assert not out[:, :, :5].any() and (lse[:, :, :5] == -torch.inf).all() and lse[:, :, 5:].isfinite().all()
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :, :5].any() and not grads[1][:, :, 3:].any() and not grads[2][:, :, 3:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lse_is_that_of_pytorchs_kernel(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 300, 16, dtype=dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=SCALE)
    rules = Rules(torch.arange(300)[None], torch.arange(300)[None])
    for ours, expected in zip(flash_with_lse(q, k, v, rules, SCALE), (out, lse), strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_parts_merge_through_their_lse(small_tiles):
    """Attention over three ranges of keys, weighted by exp(LSE), is attention over all; so are gradients."""
    *qkv, upstream = inputs(2, 4, 2, 11, 11)
    q, k, v = qkv
    outs, sums = zip(*(
        flash_with_lse(q, k[:, :, part], v[:, :, part],
                       Rules(torch.arange(11)[None], torch.arange(11)[None, part]), SCALE)
        for part in (slice(0, 2), slice(2, 7), slice(7, 11))
    ), strict=True)  # fmt: skip
    weights = torch.stack(sums).softmax(0)[..., None]
    merged = (weights * torch.stack(outs)).sum(0)
    assert_same(merged, naive(*qkv, torch.ones(11, 11, dtype=torch.bool).tril())[0], qkv, upstream)


def dropped(q, k, v, rules, p=0.3, seed=5):
    """The output with dropout, always with the same seed."""
    torch.manual_seed(seed)
    return flash_with_lse(q, k, v, rules, SCALE, p)


def test_dropout_multiplies_the_same_weights_in_both_passes(small_tiles):
    """With the identity as values the output is the weights, which shows the mask that the seed draws. Output
    and gradients are then those of whole rows with that mask, so the backward pass drew it again."""
    *qkv, upstream = inputs(2, 4, 2, 13, 13)
    rules = build_context(13, "cpu", window=9).rules
    identity, mask = torch.eye(13, dtype=torch.float64).expand(2, 2, 13, 13), rules.tile()[:, None]
    shown = dropped(*qkv[:2], identity, rules)[0] / naive(*qkv[:2], identity, mask)[0].clamp_min(1e-300)
    kept = shown.detach().round(decimals=9)
    assert set(kept[mask.expand_as(kept)].unique().tolist()) == {0, round(1 / 0.7, 9)}
    out, lse = dropped(*qkv, rules)
    assert_same(out, naive(*qkv, mask, (kept > 0).double() / 0.7)[0], qkv, upstream)
    torch.testing.assert_close(lse, naive(*qkv, mask)[1], rtol=0, atol=1e-12)  # the sum is of all weights
    assert torch.equal(dropped(*qkv, rules)[0], out) and not torch.equal(dropped(*qkv, rules, seed=6)[0], out)


def test_dropout_draws_each_tile_anew():
    """Four tiles with keys all alike: the share that is dropped, and no tile repeats another's mask."""
    S, p = 256, 0.25
    q, k, v = torch.zeros(1, 2, S, 4), torch.zeros(1, 1, S, 4), torch.eye(S)[None, None]
    out = dropped(q, k, v, Rules(torch.arange(S)[None], torch.arange(S)[None], causal=False), p)[0]
    zero = out == 0
    assert abs(zero.double().mean() - p) < 4 * (p * (1 - p) / zero.numel()) ** 0.5
    tiles = [zero[0, head, a : a + 128, b : b + 128] for head in (0, 1) for a in (0, 128) for b in (0, 128)]
    alike = [(x == y).double().mean() for n, x in enumerate(tiles) for y in tiles[:n]]
    assert all(abs(share - (p * p + (1 - p) ** 2)) < 0.03 for share in alike)


def test_gradcheck(small_tiles):
    """By finite differences, of the output with dropout and of the LSE."""
    *qkv, _ = inputs(1, 2, 1, 5, 5)
    rules = build_context(5, "cpu", window=4).rules
    assert torch.autograd.gradcheck(lambda *x: dropped(*x, rules), qkv)


def test_bf16_is_as_exact_as_plain_products(monkeypatch):
    """The softmax and the sums over tiles are fp32: in bf16, the additions of 20 tiles would each round the
    output and the gradients, a quarter more error at least. Only products are rounded, as in plain
    attention, if at other places."""
    monkeypatch.setattr(flash, "QUERIES", 32)
    monkeypatch.setattr(flash, "KEYS", 32)
    torch.manual_seed(0)
    *qkv, upstream = (torch.randn(1, n, 640, 16).bfloat16() for n in (2, 1, 1, 2))
    errors = []

    def run(path, qkv, upstream):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = path(*leaves, build_context(640, "cpu"), 0.25)
        return out, *torch.autograd.grad(out, leaves, upstream)

    real = run(eager_attention, [x.double() for x in qkv], upstream.double())
    for path in (eager_attention, flash_attention):
        ours = run(path, qkv, upstream)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(ours, real, strict=True)])
    assert all(tiled < 1.15 * plain for plain, tiled in zip(*errors, strict=True))


def peaks(path, lengths):
    """The most bytes held at a time by a forward and a backward pass, for each length."""
    for T in lengths:
        *qkv, upstream = inputs(1, 2, 1, T, T, torch.float32)
        context = build_context(T, "cpu")
        yield peak_of(lambda: torch.autograd.grad(path(*qkv, context, SCALE), qkv, upstream))  # noqa: B023


@pytest.mark.slow
def test_peak_memory_grows_linearly():
    """Each time the length doubles, the peak grows by twice as much as before, as on a straight line, and by
    as much as the tensors of a row of numbers per token. For the formula it grows by four times as much."""
    a, b, c = peaks(flash_attention, (512, 1024, 2048))
    assert (c - b) / (b - a) == pytest.approx(2, rel=0.01)
    per_head = 6 + 2 * 1 + 4  # the output, the LSE (also without -inf), the gradient of q
    numbers = 2 * per_head + (4 + 6) + 2 * 1  # two heads, the sums of k and v, the gradients of the LSE
    indices = 2 * 2  # of queries and keys, in int64
    assert (c - b) / 1024 == pytest.approx(4 * (numbers + indices), rel=0.02)
    a, b, c = peaks(eager_attention, (256, 512, 1024))
    assert (c - b) / (b - a) == pytest.approx(4, rel=0.05)


MODELS = {
    "GQA": {},
    "GQA, window": {"sliding_window": 5},
    "GQA, pattern, sinks": {"sliding_window": 3, "sliding_window_pattern": 2, "attention_sinks": 2},
    "MLA": {"attention_kind": "mla", "qk_norm": False, "num_key_value_heads": 4, "kv_lora_rank": 12,
            "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_gradients_of_eager(name, small_tiles):
    """With packed documents and padding; with a cache, filled piece by piece, the logits are the same."""
    ids = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    real = torch.arange(11) < torch.tensor([[11], [8]])
    losses, grads = [], []
    for path in ("eager", "flash"):
        model = shake(TinySeek(small_config(**MODELS[name], attn_implementation=path))).double()
        labels = ids.masked_fill(~real, -100)
        losses.append(model(ids, labels=labels, document_ids=documents, padding_mask=real).loss_sum)
        grads.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-10)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with torch.no_grad():
        cache, pieces = make_cache(model, 2, 11), ids.split([6, 1, 3, 1], dim=1)
        cached = torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)
        torch.testing.assert_close(cached, model(ids).logits, rtol=0, atol=1e-10)
