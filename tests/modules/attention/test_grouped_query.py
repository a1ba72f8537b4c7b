"""All attention paths against a loop over every query and head, and the module against Hugging Face's."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from modules.attention import blocked, grouped_query
from modules.attention.grouped_query import (
    GroupedQueryAttention,
    attend,
    eager_attention,
    sdpa_attention,
)
from modules.attention.context import AttentionContext, build_context
from modules.attention.flash import flash_attention
from modules.rope import RotaryEmbedding
from tests.modules.tools import shake, slow_attention, small_config
from utils.products import MKL, ONEDNN, multiply_with

PATHS = [eager_attention, sdpa_attention, flash_attention]
NAMES = ["auto", "blocked", "eager", "flash", "sdpa"]
RULES = {
    "causal": {},
    "everyone": {"causal": False},
    "window": {"window": 2},
    "window of one": {"window": 1},
    "window, both sides": {"causal": False, "window": 2},
    "documents": {"document_ids": True},
    "padding left": {"padding_mask": "left"},
    "padding right": {"padding_mask": "right"},
    "no real token": {"padding_mask": "none"},
    "documents, window, padding": {"document_ids": True, "window": 3, "padding_mask": "left"},
}


def make_context(T, rules):
    """The context of two rows, and the same as a function of (row, query, key)."""
    rules = dict(rules)
    documents = torch.tensor([[0] * (T // 2) + [1] * (T - T // 2), [0] * T])
    padding = torch.ones(2, T, dtype=torch.long)
    kind = rules.get("padding_mask")
    if kind == "left":
        padding[0, : T // 2] = 0
    if kind == "right":
        padding[1, T // 2 :] = 0
    if kind == "none":
        padding[0] = 0
    if kind:
        rules["padding_mask"] = padding
    if rules.get("document_ids"):
        rules["document_ids"] = documents
    causal, window = rules.get("causal", True), rules.get("window")

    def allowed(b, q, k):
        if not padding[b, q]:  # nobody reads its output: it may attend to everything
            return True
        if (causal and k > q) or (window and not q - window < k < q + window):
            return False
        if rules.get("document_ids") is not None and documents[b, q] != documents[b, k]:
            return False
        return bool(padding[b, k])

    return build_context(T, "cpu", **rules), allowed


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "heads, groups, tokens", [(4, 4, 5), (4, 2, 5), (6, 2, 3), (3, 1, 4), (1, 1, 1), (4, 2, 1)]
)
def test_value_and_gradient_are_those_of_the_loop(rules, heads, groups, tokens):
    torch.manual_seed(heads * 10 + tokens)
    context, allowed = make_context(tokens, rules)
    q = torch.randn(2, heads, tokens, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, groups, tokens, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(
        2, groups, tokens, 6, dtype=torch.float64, requires_grad=True
    )  # values may be wider than keys
    upstream = torch.randn(2, heads, tokens, 6, dtype=torch.float64)
    slow = slow_attention(q, k, v, allowed, 0.37)
    expected = torch.autograd.grad(slow, (q, k, v), upstream, allow_unused=True)
    for path in PATHS:
        ours = path(q, k, v, context, 0.37)
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-13)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), upstream), expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_padded_rows_have_finite_gradients(path, dtype):
    """In every precision, with scores far below zero, padding in front and behind: gradients are finite, and
    those of padding keys are zero."""
    torch.manual_seed(0)
    q = (torch.randn(1, 4, 4, 8) * 6 + 6).to(dtype).requires_grad_()
    k = (torch.randn(1, 2, 4, 8) * 6 - 6).to(dtype).requires_grad_()
    v = torch.randn(1, 2, 4, 8).to(dtype).requires_grad_()
    real = torch.tensor([[False, True, True, False]])
    out = path(q, k, v, build_context(4, "cpu", padding_mask=real), 1.0)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :, 1], v.repeat_interleave(2, dim=1)[:, :, 1])
    (out * real[:, None, :, None]).sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad.isfinite().all()
    assert not k.grad[:, :, [0, 3]].any() and not v.grad[:, :, [0, 3]].any()


@pytest.mark.parametrize("path", PATHS)
def test_dropout_keeps_the_mean_and_drops_weights(path):
    """With keys all alike and values the identity, the output is the weights: a share p of them is zero, the
    others are scaled by 1/(1-p)."""
    torch.manual_seed(0)
    S, p = 64, 0.25
    q, k, v = torch.zeros(1, 2, S, S), torch.zeros(1, 1, S, S), torch.eye(S)[None, None]
    out = path(q, k, v, build_context(S, "cpu", causal=False), 1.0, p)
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / out.numel()) ** 0.5
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / S / (1 - p)))


def test_dropout_is_for_training_only():
    """In eval mode the same numbers as a model without dropout, on both paths (sdpa itself does not look)."""
    x = torch.randn(2, 5, 24)
    for implementation in ("eager", "sdpa", "auto"):
        layers = [
            shake(
                GroupedQueryAttention(
                    small_config(attention_dropout=p, attn_implementation=implementation), 0
                )
            )
            for p in (0.5, 0.0)
        ]
        context, rotary = build_context(5, "cpu"), RotaryEmbedding(8)(torch.arange(5)[None])
        with_dropout, without = layers[0].eval()(x, context, rotary), layers[1].train()(x, context, rotary)
        assert torch.equal(with_dropout, without)
        layers[0].train()
        assert not torch.equal(layers[0](x, context, rotary), without)


def by_torch(q, k, v, scale):
    """PyTorch's own, on keys repeated for each query head of their group."""
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("tokens, width", [(1, 4), (63, 4), (64, 4), (65, 3), (150, 6)])
def test_by_blocks(heads, groups, tokens, width):
    """Fewer tokens than a block, exactly one, one more, a last block that is not full; other widths of v."""
    torch.manual_seed(tokens)
    q = torch.randn(2, heads, tokens, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, groups, tokens, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, groups, tokens, width, dtype=torch.float64, requires_grad=True)
    expected = by_torch(q, k, v, 0.37)
    ours = blocked.blocked_attention(q, k, v, 0.37)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
    upstream = (
        torch.randn_like(expected).transpose(1, 2).contiguous().transpose(1, 2)
    )  # strided
    real = torch.autograd.grad(expected, (q, k, v), upstream)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), upstream), real, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_by_small_blocks_is_the_loop(tokens, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 2)
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, n, tokens, 4, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    slow = slow_attention(q, k, v, lambda b, t, s: s <= t, 0.4)
    torch.testing.assert_close(blocked.blocked_attention(q, k, v, 0.4), slow, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *x: blocked.blocked_attention(*x, 0.4), (q, k, v))


def test_by_blocks_gradients_in_bf16_are_as_exact_as_those_of_plain_products():
    """dK and dV are sums over all blocks. With sums in fp32 only the products are rounded, as those of
    the eager path are; sums in bf16 would be rounded at each of the 10 blocks: half as much error again."""
    torch.manual_seed(0)
    tokens = 640
    shapes = [(1, n, tokens, 16) for n in (2, 1, 1, 2)]
    *qkv, upstream = (torch.randn(shape).bfloat16() for shape in shapes)
    wide = [x.double().requires_grad_() for x in qkv]
    real = torch.autograd.grad(by_torch(*wide, 0.25), wide, upstream.double())
    context, errors = build_context(tokens, "cpu"), []
    for path in (eager_attention, lambda q, k, v, _, scale: blocked.blocked_attention(q, k, v, scale)):
        ours = [x.clone().requires_grad_() for x in qkv]
        grads = torch.autograd.grad(path(*ours, context, 0.25), ours, upstream)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(grads, real, strict=True)])
    for plain, by_blocks in zip(*errors, strict=True):
        assert by_blocks < 1.25 * plain


@pytest.mark.parametrize("training", [True, False])
def test_by_blocks_probabilities_are_kept_for_a_backward_pass_only(training, monkeypatch):
    """Those of all blocks are half as large as all scores. Without gradients, one block's go before the next
    but one comes."""
    probs, alive, softmax = [], [], torch.Tensor.softmax

    def spy(scores, dim):
        alive.append(sum(one() is not None for one in probs))
        out = softmax(scores, dim)
        probs.append(weakref.ref(out))
        return out

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    q, k, v = (torch.randn(1, n, 200, 4, requires_grad=True) for n in (2, 1, 1))
    with torch.set_grad_enabled(training):
        blocked.blocked_attention(q, k, v, 0.5)
    assert alive == ([0, 1, 2, 3] if training else [0, 1, 1, 1])


@pytest.mark.parametrize("groups", [4, 2])
def test_with_a_mask_gpus_get_one_key_per_query_head(groups, monkeypatch):
    """On GPUs, only the kernel that stores all scores takes both a mask and shared keys. A tensor without
    data stands for a GPU's."""
    seen, real = [], F.scaled_dot_product_attention
    spy = lambda q, k, v, **options: seen.append((k.shape[1], options["enable_gqa"])) or real(  # noqa: E731
        q, k, v, **options
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = (torch.empty(2, n, 6, 8, device="meta") for n in (4, groups, groups))
    for rules in ({}, {"window": 3}):
        assert sdpa_attention(q, k, v, build_context(6, "meta", **rules), 0.3).shape == q.shape
    assert seen == [(groups, groups < 4), (4, False)]


def test_whatever_path_is_chosen_the_answer_is_the_same():
    """Every `attn_implementation`, with the plain triangle, with a mask, and for a new token after a past."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 4, dtype=torch.float64) for n in (4, 2, 2))
    for rules in ({}, {"window": 3}, {"causal": False}, {"padding_mask": "left"}):
        context, allowed = make_context(9, rules)
        slow = slow_attention(q, k, v, allowed, 0.5)
        for name in NAMES:
            torch.testing.assert_close(attend(name, q, k, v, context, 0.5), slow, rtol=0, atol=1e-13)
            low = attend(name, q.bfloat16(), k.bfloat16(), v.bfloat16(), context, 0.5)
            torch.testing.assert_close(low.double(), slow, rtol=0.05, atol=0.05)
    one = AttentionContext(torch.tensor([[8]]), None, False)
    slow = slow_attention(q[:, :, -1:], k, v, lambda b, t, s: True, 0.5)
    for name in NAMES:
        torch.testing.assert_close(attend(name, q[:, :, -1:], k, v, one, 0.5), slow, rtol=0, atol=1e-13)


def test_long_masks_are_read_by_tiles(monkeypatch):
    """From `LONG` numbers on, and the answer stays the same; whole causal rows keep their blocks."""
    used = []
    spy = lambda q, *rest: used.append(q.shape[2]) or flash_attention(q, *rest)  # noqa: E731
    monkeypatch.setattr(grouped_query, "LONG", 9 * 9)
    monkeypatch.setattr(grouped_query, "flash_attention", spy)
    torch.manual_seed(0)
    for tokens in (8, 9):
        q, k, v = (torch.randn(2, n, tokens, 4, dtype=torch.float64) for n in (4, 2, 2))
        for rules in ({}, {"window": 3}):
            context, allowed = make_context(tokens, rules)
            slow = slow_attention(q, k, v, allowed, 0.5)
            torch.testing.assert_close(attend("auto", q, k, v, context, 0.5), slow, rtol=0, atol=1e-13)
    assert used == [9]


@pytest.mark.parametrize("name", ["auto", "blocked"])
def test_by_blocks_there_is_no_dropout_so_another_path_takes_over(name):
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 2, 64, 64), torch.zeros(1, 1, 64, 64), torch.eye(64)[None, None]
    out = attend(name, q, k, v, build_context(64, "cpu"), 1.0, 0.25)
    seen = torch.ones(64, 64, dtype=torch.bool).tril().expand_as(out)
    assert not out[~seen].any() and 0.2 < (out[seen] == 0).double().mean() < 0.3


@pytest.mark.parametrize("path", PATHS)
def test_bf16_is_near_the_exact_answer(path):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    context = build_context(9, "cpu", window=4)
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=context.mask, scale=0.25
    )
    ours = path(q.bfloat16(), k.bfloat16(), v.bfloat16(), context, 0.25).float()
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.03)


def twin(config):
    """Hugging Face's attention of the same shape."""
    same = "hidden_size num_attention_heads num_key_value_heads head_dim rms_norm_eps attention_bias"
    theirs = Qwen3Config(
        **{name: getattr(config, name) for name in same.split()},
        num_hidden_layers=1,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    return Qwen3Attention(theirs, 0).eval(), Qwen3RotaryEmbedding(theirs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "blocked", "auto"])
@pytest.mark.parametrize("heads, groups, bias", [(4, 4, False), (4, 2, True), (3, 1, False), (1, 1, True)])
def test_the_module_is_qwen3s(implementation, heads, groups, bias):
    config = small_config(
        num_attention_heads=heads, num_key_value_heads=groups, attention_bias=bias, rms_norm_eps=1e-3,
        attn_implementation=implementation, rope_theta=500.0,
    )  # fmt: skip
    ours = shake(GroupedQueryAttention(config, 0), seed=heads)
    theirs, their_rope = twin(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 24, requires_grad=True)
    context = build_context(7, "cpu")
    y = ours(x, context, RotaryEmbedding(8, 500.0)(context.positions))
    minus = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    expected = theirs(x, their_rope(x, context.positions), minus)[0]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    parameters = dict(theirs.named_parameters())
    mine = torch.autograd.grad(y, [x, *ours.parameters()], upstream)
    other = torch.autograd.grad(expected, [x, *(parameters[n] for n, _ in ours.named_parameters())], upstream)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_without_qk_norm_nothing_is_normed():
    layer = GroupedQueryAttention(small_config(qk_norm=False), 0)
    assert isinstance(layer.q_norm, nn.Identity) and not [
        n for n, _ in layer.named_parameters() if "norm" in n
    ]
    torch.manual_seed(0)
    layer = shake(layer.double())
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    context = build_context(3, "cpu")
    tables = (
        torch.ones(1, 3, 8, dtype=torch.float64),
        torch.zeros(1, 3, 8, dtype=torch.float64),
    )  # no rotation
    q, k, v = (
        project(x).view(1, 3, -1, 8).transpose(1, 2) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    slow = slow_attention(q, k, v, lambda b, t, s: s <= t, 8**-0.5)
    expected = slow.transpose(1, 2).reshape(1, 3, 32) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x, context, tables), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "dtype", "library", "path"), [
    (None, torch.float32, MKL, "blocked"), (None, torch.float32, ONEDNN, "blocked"),
    (None, torch.bfloat16, MKL, "blocked"), (3, torch.float32, MKL, "sdpa"),
    (3, torch.float32, ONEDNN, "eager"), (3, torch.bfloat16, MKL, "eager"),
])  # fmt: skip
def test_auto_takes_the_path_measured_to_be_fastest_on_a_cpu(monkeypatch, window, dtype, library, path):
    """docs/experiments.md, 36: short rows too; with a mask, PyTorch's kernel only where MKL multiplies."""
    for name in ("blocked", "sdpa", "eager"):
        monkeypatch.setattr(grouped_query, f"{name}_attention", lambda *_, name=name: name)
    q = torch.randn(1, 2, 7, 4, dtype=dtype)
    with multiply_with(library):
        assert attend("auto", q, q, q, build_context(7, "cpu", window=window), 0.5) == path
