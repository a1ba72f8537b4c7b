"""Latent attention against Hugging Face's `DeepseekV3Attention`, and in both of its forms against a loop over
heads, queries and keys in fp64; with a cache against the same without."""

import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from config.adapters import LoraConfig
from model.caches import make_cache
from model.tinyseek import TinySeek
from modules.adapters.lora_model import add_lora, merge, switch_of
from modules.attention import latent as mla
from modules.attention.grouped_query import attend
from modules.attention.context import AttentionContext, Rules, build_context
from modules.attention.latent_cache import LatentCache
from modules.attention.latent import LatentAttention, softmax_scale
from modules.rope import RotaryEmbedding
from tests.modules.attention.test_grouped_query import RULES, make_context
from tests.modules.tools import shake, slow_attention, small_config

NAMES = ["auto", "blocked", "eager", "sdpa"]
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}
KINDS = {
    "queries not compressed": {},
    "queries compressed, biases": {"q_lora_rank": 7, "attention_bias": True},
    "compressed, interleaved, narrow values": {"q_lora_rank": 5, "rope_interleaved": True, "v_head_dim": 3},
    "one head, biases, wide values": {"num_attention_heads": 1, "attention_bias": True, "v_head_dim": 14},
    "three heads, wide latents, interleaved": {
        "num_attention_heads": 3, "kv_lora_rank": 33, "rope_interleaved": True,
    },
    "latents of one number": {"kv_lora_rank": 1, "q_lora_rank": 1, "qk_rope_head_dim": 2},
    "yarn, equal mscales": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, other mscales": {
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, "rope_interleaved": True,
        "q_lora_rank": 6,
    },
    "yarn, mscale of all alone": {"rope_scaling": YARN | {"mscale_all_dim": 0.8}},
    "yarn, no mscale": {"rope_scaling": YARN},
}  # fmt: skip


def mla_config(**changes):
    """A tiny configuration in which no two widths are equal."""
    values = {
        "attention_kind": "mla", "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
        "v_head_dim": 5, "rms_norm_eps": 0.1, "rope_theta": 500.0, "num_key_value_heads": 1,
        "max_position_embeddings": 640,
    }  # fmt: skip
    return small_config(**(values | changes))


def twin(config, implementation):
    """Hugging Face's attention of the same shape, and its rotary tables."""
    same = "hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim"
    same += " v_head_dim attention_bias rms_norm_eps max_position_embeddings"
    theirs = DeepseekV3Config(
        **{name: getattr(config, name) for name in same.split()},
        num_key_value_heads=config.num_attention_heads,
        num_hidden_layers=1,
        rope_interleave=config.rope_interleaved,
        rope_parameters={"rope_type": "default"} | (config.rope_scaling or {}) | {"rope_theta": 500.0},
        attn_implementation=implementation,
    )
    return DeepseekV3Attention(theirs, 0).eval(), DeepseekV3RotaryEmbedding(theirs)


def pair(config, dtype, implementation="sdpa", seed=1):
    """Ours and theirs with the same random weights; strict loading proves the names."""
    ours = shake(LatentAttention(config, 0), seed=seed).to(dtype)
    theirs, rope = twin(config, implementation)
    theirs.to(dtype).load_state_dict(ours.state_dict(), strict=True)
    if dtype == torch.float64:  # theirs compute norms in fp32, whatever comes: take PyTorch's
        for name, norm in list(theirs.named_children()):
            if name.endswith("layernorm"):
                exact = nn.RMSNorm(norm.weight.shape, eps=1e-6, dtype=dtype)
                exact.load_state_dict(norm.state_dict())
                setattr(theirs, name, exact)
    return ours, theirs, rope


def minus(T, dtype):
    return torch.full((T, T), -torch.inf, dtype=dtype).triu(1)[None, None]


def gradients(layer, y, x, upstream):
    named = dict(layer.named_parameters())
    found = torch.autograd.grad(y, [x, *named.values()], upstream)
    return dict(zip(["x", *named], found, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_module_is_deepseeks(kind, name):
    """Each with tables of its own, in fp32."""
    config = mla_config(**KINDS[kind], attn_implementation=name)
    ours, theirs, their_rope = pair(config, torch.float32, "eager")
    rope = RotaryEmbedding(
        config.rotary_dim, 500.0, config.rope_scaling, config.max_position_embeddings, config.rope_interleaved
    )
    torch.manual_seed(0)
    for T in (1, 7):
        x = torch.randn(2, T, 24, requires_grad=True)
        positions = torch.stack([torch.arange(T), torch.arange(T) + 9])
        context = build_context(T, "cpu", position_ids=positions)
        y = ours(x, context, rope(positions))
        expected = theirs(x, their_rope(x, positions), minus(T, x.dtype))[0]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(y)
        mine, other = (gradients(m, o, x, upstream) for m, o in ((ours, y), (theirs, expected)))
        assert mine.keys() == other.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], rtol=1e-4, atol=5e-5, msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_to_the_last_digits_in_fp64(kind):
    """On the tables of Hugging Face, which are in fp32; its norms by PyTorch's, its softmax by the kernel."""
    config = mla_config(**KINDS[kind])
    ours, theirs, their_rope = pair(config, torch.float64)
    torch.manual_seed(0)
    T = 70  # more than a block of `blocked_attention`
    x = torch.randn(2, T, 24, dtype=torch.float64, requires_grad=True)
    context = build_context(T, "cpu")
    tables = [t.double() for t in their_rope(x.float(), context.positions)]
    half = config.rotary_dim // 2
    spread = [t[..., :half].repeat_interleave(2, -1) if config.rope_interleaved else t for t in tables]
    y = ours(x, context, spread)
    expected = theirs(x, tables, minus(T, x.dtype))[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(y)
    mine, other = (gradients(m, o, x, upstream) for m, o in ((ours, y), (theirs, expected)))
    for key in mine:
        torch.testing.assert_close(mine[key], other[key], rtol=1e-12, atol=1e-10, msg=key)


def test_the_norms_of_the_latents_have_an_eps_of_their_own():
    """Latents so small that 1e-6 and the configuration's eps, or none, are worlds apart."""
    config = mla_config(q_lora_rank=7)
    ours, theirs, their_rope = pair(config, torch.float32, "eager")
    x = torch.randn(2, 5, 24) * 1e-3
    context = build_context(5, "cpu")
    tables = their_rope(x, context.positions)
    expected = theirs(x, tables, minus(5, x.dtype))[0]
    torch.testing.assert_close(ours(x, context, tables), expected, rtol=1e-4, atol=1e-6)


def slow_mla(layer, config, x, positions, allowed):
    """Latent attention as in the paper, head by head, from the layer's weights. x (B, T, C) -> (B, T, C)."""
    H, R = config.num_attention_heads, config.kv_lora_rank
    nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    w = dict(layer.named_parameters())

    def norm(c, gain):
        return c / (c.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turn(c):  # (B, T, rope), a pair of channels as one complex number
        frequencies = torch.tensor([256.0 ** (-2 * i / rope) for i in range(rope // 2)], dtype=c.dtype)
        angle = positions[..., None] * frequencies
        if config.rope_interleaved:
            first, second = c[..., 0::2].contiguous(), c[..., 1::2].contiguous()
        else:
            first, second = c[..., : rope // 2], c[..., rope // 2 :]
        z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)  # the same order for q and k: scores do not mind

    c_q = norm(x @ w["q_a_proj.weight"].T + w["q_a_proj.bias"], w["q_a_layernorm.weight"])
    down = x @ w["kv_a_proj_with_mqa.weight"].T + w["kv_a_proj_with_mqa.bias"]
    c_kv, k_r = norm(down[..., :R], w["kv_a_layernorm.weight"]), turn(down[..., R:])
    heads = []
    for h in range(H):
        w_q = w["q_b_proj.weight"][h * (nope + rope) : (h + 1) * (nope + rope)]
        w_kv = w["kv_b_proj.weight"][h * (nope + v_dim) : (h + 1) * (nope + v_dim)]
        q = torch.cat([c_q @ w_q[:nope].T, turn(c_q @ w_q[nope:].T)], dim=-1)
        k = torch.cat([c_kv @ w_kv[:nope].T, k_r], dim=-1)
        v = c_kv @ w_kv[nope:].T
        heads.append(slow_attention(q[:, None], k[:, None], v[:, None], allowed, (nope + rope) ** -0.5)[:, 0])
    return torch.cat(heads, dim=-1) @ w["o_proj.weight"].T + w["o_proj.bias"]


@pytest.fixture
def forced(monkeypatch):
    """Make every layer use one form, with or without need; None lets it choose."""

    def force(form):
        if form is not None:
            monkeypatch.setattr(LatentAttention, "absorbing_pays", lambda *_: form == "absorbed")

    return force


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rules", [name for name in RULES if "window" not in name])
def test_every_rule_is_that_of_the_loop(rules, interleaved, forced):
    """Causal, documents, padding, nothing at all to look at: both forms, value and gradients, and zeros."""
    T = 5
    context, allowed = make_context(T, RULES[rules])
    config = mla_config(
        q_lora_rank=7, num_attention_heads=3, attention_bias=True, rope_interleaved=interleaved,
        rope_theta=256.0,
    )  # fmt: skip
    layer = shake(LatentAttention(config, 0), seed=3).double()
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 2, T, 24, dtype=torch.float64)
    x.requires_grad_()
    positions = torch.arange(T).expand(2, T)
    expected = slow_mla(layer, config, x, positions, allowed)
    real = gradients(layer, expected, x, upstream)
    rotary = RotaryEmbedding(4, 256.0, interleaved=interleaved).double()(positions)  # exact: 1 and 1/16
    for name in NAMES:
        layer.implementation = name
        for form in ("expanded", "absorbed"):
            forced(form)
            y = layer(x, context, rotary, Passing())
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
            found = gradients(layer, y, x, upstream)
            for key in found:
                torch.testing.assert_close(found[key], real[key], rtol=0, atol=1e-11, msg=key)
    blind = [(b, t) for b in range(2) for t in range(T) if not any(allowed(b, t, s) for s in range(T))]
    for b, t in blind:
        assert torch.equal(y[b, t], layer.o_proj.bias)


class Passing:
    """A cache that keeps nothing."""

    def append(self, layer, latents):
        return latents


def test_the_scale_is_that_of_a_key_and_of_deepseeks_yarn():
    """Published: V3 stretches 40 times with mscale 1, V2-Lite with 0.707; keys are 128 + 64 wide."""
    wide = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "kv_lora_rank": 512}
    assert softmax_scale(mla_config(**wide)) == pytest.approx(192**-0.5, rel=1e-15)
    for mscale, squared in ((1.0, 1.8738542), (0.707, 1.5896262)):
        published = YARN | {"mscale": mscale, "mscale_all_dim": mscale}
        scale = softmax_scale(mla_config(**wide, rope_scaling=published))
        assert scale * 192**0.5 == pytest.approx(squared, abs=1e-7)
        ratio = published | {"factor": None, "type": "yarn"}  # the factor as a ratio of lengths: 640 / 16
        assert softmax_scale(mla_config(**wide, rope_scaling=ratio, max_position_embeddings=640)) == scale
        assert softmax_scale(mla_config(**wide, rope_scaling=ratio, max_position_embeddings=8)) == 192**-0.5
    for plain in (YARN, {"rope_type": "linear", "factor": 4.0}):
        assert softmax_scale(mla_config(**wide, rope_scaling=plain)) == pytest.approx(192**-0.5, rel=1e-15)


@pytest.mark.parametrize(
    "heads, rank, nope, rope, v_dim", [(3, 10, 6, 4, 5), (1, 2, 7, 2, 9), (2, 8, 8, 6, 8), (2, 20, 3, 2, 8)]
)
def test_the_cheaper_form_is_chosen(heads, rank, nope, rope, v_dim):
    """By the products that PyTorch counts. Latents narrower than half a key and value always win."""
    config = mla_config(
        num_attention_heads=heads, kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
        v_head_dim=v_dim, attn_implementation="eager",
    )  # fmt: skip
    layer = LatentAttention(config, 0)

    def count(form, T, S):
        everyone = Rules(torch.zeros(1, T), torch.zeros(1, S))
        context = AttentionContext(torch.zeros(1, T), everyone, False)
        sizes = (1, heads, T, nope), (1, heads, T, rope), (1, 1, S, rank + rope)
        with FlopCounterMode(display=False) as counter:
            form(*(torch.zeros(size) for size in sizes), context)
        return counter.get_total_flops()

    seen = set()
    for S in (1, 2, 3, 7, 30):
        for T in (t for t in (1, 2, 3, 5, 7, 8, 20, 30) if t <= S):
            expanded, absorbed = count(layer.expanded, T, S), count(layer.absorbed, T, S)
            assert layer.absorbing_pays(T, S) == (absorbed < expanded)
            seen.add(absorbed < expanded)
    assert seen == ({True} if 2 * rank < nope + v_dim else {True, False})
    assert count(layer.absorbed, 1, 31) - count(layer.absorbed, 1, 30) == 2 * heads * (2 * rank + rope)


def stack(kind, seed=5):
    """Two layers with a residual stream, in fp64: `run(x, cache, new_tokens)` -> (B, T, C)."""
    config = mla_config(**KINDS[kind], num_hidden_layers=2)
    layers = [shake(LatentAttention(config, n), seed=seed + n).double().eval() for n in range(2)]
    rope = RotaryEmbedding(
        config.rotary_dim, 500.0, config.rope_scaling, config.max_position_embeddings, config.rope_interleaved
    ).double()

    def run(x, cache=None, new_tokens=None):
        if cache is not None:
            cache.begin(x.shape[1], new_tokens)
        context = build_context(x.shape[1], "cpu", cache=cache)
        rotary = rope(context.positions)
        for layer in layers:
            x = x + layer(x, context, rotary, cache)
        if cache is not None:
            cache.advance()
        return x

    def make(rows, capacity):
        return LatentCache(2, rows, capacity, config.kv_lora_rank, config.rotary_dim, torch.float64, "cpu")

    return run, make


def rows(B, T, seed=0):
    return torch.randn(B, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FORMS = [None, "expanded", "absorbed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pieces_are_the_whole(kind, form, forced):
    """Token by token, prompt and decode, prompt in chunks, all at once."""
    run, make = stack(kind)
    x = rows(2, 27)
    expected = run(x)
    forced(form)
    for pieces in ([1] * 27, [9] + [1] * 18, [5, 1, 7, 2, 2, 10], [27], [20, 7]):
        cache = make(2, 27)
        parts = [run(part, cache) for part in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)
        assert cache.lengths == [27, 27]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", list(KINDS)[:5])
@torch.no_grad()
def test_ragged_rows_are_each_row_alone(kind, form, forced):
    """Rows of different lengths, padded on the right, in several rounds, some rows resting."""
    run, make = stack(kind)
    rounds = [[6, 1, 3], [1, 1, 1], [2, 9, 0], [1, 1, 1], [0, 4, 19], [1, 1, 1]]
    totals = [sum(column) for column in zip(*rounds, strict=True)]
    texts = [rows(1, total, seed=b) for b, total in enumerate(totals)]
    expected = [run(text)[0] for text in texts]
    forced(form)
    cache, done = make(3, max(totals)), [0, 0, 0]
    for new in rounds:
        batch = rows(3, max(new), seed=99)
        for b in range(3):
            batch[b, : new[b]] = texts[b][0, done[b] : done[b] + new[b]]
        out = run(batch, cache, None if set(new) == {1} else new)
        for b in range(3):
            right = expected[b][done[b] : done[b] + new[b]]
            torch.testing.assert_close(out[b, : new[b]], right, rtol=0, atol=1e-12)
        done = [a + n for a, n in zip(done, new, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_rejected_drafts_leave_no_trace(seed, form, forced):
    run, make = stack("queries compressed, biases")
    x = rows(2, 40, seed=7)
    expected = run(x)
    forced(form)
    cache, dice, done = make(2, 50), random.Random(seed), [0, 0]
    while min(done) < 30:
        size = dice.randint(1, 8)
        good = [dice.randint(0, min(size, 40 - d)) for d in done]
        draft = rows(2, size, seed=dice.randint(0, 999))
        for b in range(2):
            draft[b, : good[b]] = x[b, done[b] : done[b] + good[b]]
        out = run(draft, cache)
        for b in range(2):
            right = expected[b, done[b] : done[b] + good[b]]
            torch.testing.assert_close(out[b, : good[b]], right, rtol=0, atol=1e-12)
        done = [d + g for d, g in zip(done, good, strict=True)]
        cache.crop(done)


@torch.no_grad()
def test_a_prefix_of_latents_continues_a_text():
    run, make = stack("yarn, other mscales")
    x = rows(2, 12)
    first, cache = make(2, 5), make(2, 12)
    run(x[:, :5], first)
    for layer in range(2):
        cache.start_with(layer, *first.store[layer])
    torch.testing.assert_close(run(x[:, 5:], cache), run(x)[:, 5:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_past_is_not_expanded_when_a_token_is_decoded():
    """What goes through kv_b_proj while decoding: the prompt once, then nothing."""
    layer = shake(LatentAttention(mla_config(), 0))
    lengths, cache = [], LatentCache(1, 1, 20, 10, 4, torch.float32, "cpu")
    layer.kv_b_proj.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-2]))
    for tokens in (16, 1, 1):
        cache.begin(tokens)
        context = build_context(tokens, "cpu", cache=cache)
        layer(torch.randn(1, tokens, 24), context, RotaryEmbedding(4)(context.positions), cache)
        cache.advance()
    assert lengths == [16]


@torch.no_grad()
def test_a_merged_adapter_and_the_base_alone_are_decoded_absorbed():
    """As a plain layer is, or a merged adapter would cost the expansion of the whole past at each token. An
    adapter beside the weights is expanded: there the weight alone is not what the layer computes."""
    model = TinySeek(mla_config()).eval()
    add_lora(model, LoraConfig(target_modules=["kv_b_proj"]))
    shake(model)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.absorbed = (lambda real: lambda *rest: calls.append(1) or real(*rest))(
            layer.self_attn.absorbed
        )

    def decode():
        calls.clear()
        cache, text = make_cache(model, 1, 16), torch.arange(1, 13)[None]
        parts = [model(part, cache=cache).logits for part in text.split([9, 1, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(text).logits, rtol=1e-4, atol=1e-4)
        return len(calls)

    layers, switch = len(model.model.layers), switch_of(model)
    switch.use("default")
    assert decode() == 0
    switch.use(None)
    assert decode() == 3 * layers
    merge(model, "default")
    assert decode() == 3 * layers


def test_training_expands_and_takes_the_path_of_the_configuration(monkeypatch):
    """However narrow the latents are; without a cache there is no past to save."""
    taken = []
    monkeypatch.setattr(mla, "attend", lambda name, *rest: taken.append(name) or attend(name, *rest))
    for name in NAMES:
        layer = LatentAttention(mla_config(kv_lora_rank=1, attn_implementation=name), 0)
        context = build_context(6, "cpu")
        layer(torch.randn(1, 6, 24), context, RotaryEmbedding(4)(context.positions)).sum().backward()
    assert taken == NAMES


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_dropout_is_for_training_only(form, forced):
    forced(form)
    x, context = torch.randn(2, 5, 24), build_context(5, "cpu")
    rotary = RotaryEmbedding(4)(context.positions)
    for name in NAMES:
        some, none = (
            shake(LatentAttention(mla_config(attention_dropout=p, attn_implementation=name), 0))
            for p in (0.5, 0.0)
        )
        plain = none.train()(x, context, rotary, Passing())
        # blocks, the choice of `auto` without dropout, round in another order
        torch.testing.assert_close(some.eval()(x, context, rotary, Passing()), plain)
        some.train()
        assert (some(x, context, rotary, Passing()) - plain).abs().max() > 0.01


@torch.no_grad()
def test_half_precision_and_autocast():
    """In bf16, and with fp32 weights under autocast, a cache is still taken and gives what none gives."""
    x = torch.randn(2, 9, 24)
    for cast, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        for name in NAMES:
            config = mla_config(attn_implementation=name)
            layer = shake(LatentAttention(config, 0), scale=0.2).to(cast)
            rope = RotaryEmbedding(4, 500.0)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                context = build_context(9, "cpu")
                whole = layer(x.to(cast), context, rope(context.positions)).float()
                cache, parts = LatentCache(1, 2, 9, 10, 4, cast, "cpu"), []
                for piece, new in zip(x.to(cast).split([4, 1, 4], dim=1), (None, [1, 1], None), strict=True):
                    cache.begin(piece.shape[1], new)
                    context = build_context(piece.shape[1], "cpu", cache=cache)
                    parts.append(layer(piece, context, rope(context.positions), cache))
                    cache.advance()
            exact = layer.float()(x, build_context(9, "cpu"), rope(torch.arange(9)[None]))
            torch.testing.assert_close(whole, exact, rtol=0.05, atol=0.05)
            torch.testing.assert_close(torch.cat(parts, dim=1).float(), exact, rtol=0.05, atol=0.05)
