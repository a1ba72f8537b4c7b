"""The Triton kernels in Triton's interpreter, against the formula in fp64; and their boxes, against the mask.

The interpreter must be switched on before Triton is imported, which other tests may have done: a process of
its own computes all cases, by running this file.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from modules.attention import flash_kernels, flash_triton, grouped_query
from modules.attention.cache import KVCache
from modules.attention.context import AttentionContext, Rules, build_context
from modules.attention.rolling_cache import RollingKVCache

ROOT = Path(__file__).resolve().parents[3]
TILE, SCALE = 16, 0.3
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


def padded(*lengths, tokens):
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def packed(tokens):
    return torch.stack([torch.arange(tokens) // 11, (torch.arange(tokens) > 12).int() * 7])


def cached(kind, past, new, tokens):
    """The context of `tokens` more columns, of which `new` are real, after `past` tokens per row."""
    width = [len(past), 64, 1, 1, torch.float32, "cpu"]
    cache = KVCache(1, *width) if kind == "all" else RollingKVCache(1, len(past), 10, *width[2:], margin=4)
    for count, columns in ((past, max(past)), (new, tokens)):
        cache.begin(columns, count)
        context = build_context(columns, "cpu", cache=cache, window=None if kind == "all" else 10)
        cache.append(0, *torch.zeros(2, len(past), 1, columns, 1))
        cache.advance()
    return context


def nothing():
    """Two rows; the second one has no key yet."""
    keys = torch.stack([torch.arange(20), torch.full((20,), -1)])
    rules = Rules(torch.arange(17)[None], keys, causal=False)
    return AttentionContext(rules.query_index, rules, is_causal=False)


def mixed():
    """Documents and padding, which begins in the first tile of the second row."""
    documents, real = packed(24), padded(24, 15, tokens=24)
    return build_context(24, "cpu", document_ids=documents, padding_mask=real)


def prefix():
    return build_context(33, "cpu", prefix=5, window=9, document_ids=packed(33)[:1])


CASES = {  # context, dtype, query heads, key/value heads, D, Dv
    "triangle": (lambda: build_context(37, "cpu"), torch.float32, 2, 1, 24, 24),
    "everyone": (lambda: build_context(18, "cpu", causal=False), torch.float16, 1, 1, 16, 16),
    "window": (lambda: build_context(53, "cpu", window=7), torch.float16, 2, 2, 24, 8),
    "both sides": (lambda: build_context(36, "cpu", causal=False, window=4), torch.float32, 1, 1, 16, 16),
    "sinks": (lambda: build_context(53, "cpu", window=7, sinks=3), torch.float32, 2, 1, 16, 16),
    "packed": (mixed, torch.float32, 2, 1, 16, 40),
    "prefix": (prefix, torch.float32, 2, 1, 16, 16),
    "ragged": (lambda: cached("all", [25, 3, 0], [2, 5, 1], 5), torch.float32, 4, 2, 16, 16),
    "ring": (lambda: cached("ring", [25, 3], [3, 2], 3), torch.float16, 2, 1, 16, 16),
    "nothing": (nothing, torch.float32, 2, 1, 16, 16),
}  # fmt: skip
MASKED = [name for name in CASES if name not in ("triangle", "everyone")]


def inputs(name):
    """q, k, v and the gradient of the output in a layout as layers have it, and the context of a case."""
    make, dtype, H, G, D, E = CASES[name]
    context = make()
    T = context.positions.shape[1]
    S = T if context.rules is None else context.rules.key_index.shape[1]
    B = 1 if context.mask is None else len(context.mask)
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, E), (B, T, H, E)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v)], grad, context


def formula(q, k, v, context, scale):
    """Attention in fp64, with all scores in memory."""
    shared = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(shared, 1) for x in (k, v))
    scores = q @ k.mT * scale
    seen = torch.ones_like(scores, dtype=torch.bool) if context.mask is None else context.mask
    if context.is_causal:
        seen = seen.tril()
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * seen
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ v


def in_the_interpreter(path):
    """Compute all cases with small tiles, and save them."""
    flash_triton.sizes = lambda D, E, bytes_per_number: (*flash_kernels.sizes(D, E, 2)[:2], TILE)
    results = {}
    for name in CASES:
        leaves, grad, context = inputs(name)
        attention = flash_triton.triton_attention
        if name == "both sides":  # recomputed in the backward pass, where saved tensors can be read once
            attention = partial(checkpoint, attention, use_reentrant=False)
        out = attention(*leaves, context, SCALE)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    torch.save(results, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    command = [sys.executable, "-m", "tests.modules.attention.test_flash_triton", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_formula(interpreted, name):
    """fp32 rounds to 2^-24, and sums of some tens of terms are a little worse; fp16 rounds the weights, the
    gradients of the scores and the results to 2^-11 each."""
    leaves, grad, context = inputs(name)
    out = formula(*leaves, context, SCALE)
    expected = [out, *torch.autograd.grad(out, leaves, grad.double())]
    bound = 2.0**-20 if grad.dtype == torch.float32 else 2.0**-10
    for ours, other in zip(interpreted[name], expected, strict=True):
        assert ours.dtype == grad.dtype
        assert (ours - other).norm() <= bound * other.norm()


@TRITON
@pytest.mark.slow
def test_a_query_that_sees_nothing_has_no_value_and_no_gradient(interpreted):
    for ours in interpreted["nothing"]:
        assert ours[0].abs().min() > 0 and torch.equal(ours[1], torch.zeros_like(ours[1]))


def overlap(a, b):
    """Which boxes of a (B, 4, N) overlap which of b (B, 4, M): (B, N, M)."""
    (low, high, first, last), other = a[..., None].unbind(1), b[:, :, None].unbind(1)
    return (low <= other[1]) & (other[0] <= high) & (first <= other[3]) & (other[2] <= last)


@pytest.mark.parametrize("name", MASKED)
def test_boxes_are_the_mask_and_tiles_that_cannot_meet_hold_none_of_it(name):
    context = CASES[name][0]()
    mask = context.mask[:, 0]
    queries, keys, query_tiles, key_tiles = flash_triton.plan(context.rules, len(mask), TILE)
    assert torch.equal(overlap(queries, keys), mask)
    T, S = mask.shape[1:]
    mask = torch.nn.functional.pad(mask, (0, -S % TILE, 0, -T % TILE))
    needed = mask.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).any(4).any(2)  # (B, tiles, tiles)
    near = overlap(query_tiles, key_tiles)
    assert not (needed & ~near).any()
    if name in ("window", "both sides"):
        assert torch.equal(near, needed)  # and no tile outside of the window is computed


def test_sinks_have_boxes_that_reach_as_far_as_they_are_seen():
    """With both kinds of windows, and packed documents with sinks of their own."""
    documents = torch.tensor([[0] * 9 + [1] * 14, [2] * 3 + [3] * 20])
    for options in ({}, {"causal": False}, {"document_ids": documents}):
        context = build_context(23, "cpu", window=4, sinks=6, **options)  # more than the window
        queries, keys, *_ = flash_triton.plan(context.rules, len(context.mask), TILE)
        assert torch.equal(overlap(queries, keys), context.mask[:, 0])


def test_layers_share_the_boxes_but_not_with_other_tiles():
    rules = build_context(40, "cpu", window=5).rules
    first = flash_triton.plan(rules, 2, 16)
    assert flash_triton.plan(rules, 2, 16) is first
    assert flash_triton.plan(rules, 2, 32)[2].shape == (2, 4, 2) and first[2].shape == (2, 4, 3)


@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward_kernel", "query_kernel", "key_kernel"])
def test_the_compiler_for_gpus_takes_the_kernel(monkeypatch, tmp_path, kernel):
    """For bf16, which the interpreter cannot multiply. Compiling for compute capability 8.0 needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(flash_kernels, kernel)
    constants = {"D": 12, "E": 16, "WIDTH": 16, "WIDTH_V": 16, "TILE": 16, "TILES": 4, "PRECISION": "ieee"}
    kinds = dict.fromkeys(("T", "S", "R"), "i32") | dict.fromkeys(constants, "constexpr")
    kinds |= {"plan": ("*i32",) * 4, "strides": (("i32",) * 4,) * 6, "scale": "fp32"}
    kinds |= dict.fromkeys(("lse", "delta"), "*fp32")
    signature = {name: kinds.get(name, "*bf16") for name in function.arg_names}
    source = ASTSource(function, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_stages": 1})
    assert "mma.sync" in compiled.asm["ptx"] and ".bf16" in compiled.asm["ptx"]


@pytest.mark.parametrize(("options", "groups", "dropout", "dtype", "path"), [
    ({"window": 3}, 2, 0.0, torch.bfloat16, "triton"), ({"window": 3}, 4, 0.0, torch.bfloat16, "sdpa"),
    ({}, 2, 0.0, torch.bfloat16, "sdpa"), ({"window": 3}, 2, 0.1, torch.bfloat16, "sdpa"),
    ({"window": 3}, 2, 0.0, torch.float64, "sdpa"),
])  # fmt: skip
def test_gpus_take_it_for_a_mask_with_shared_keys_and_without_dropout(
    monkeypatch, options, groups, dropout, dtype, path
):
    monkeypatch.setattr(flash_triton, "triton", True)
    monkeypatch.setattr(flash_triton, "triton_attention", lambda *_: "triton")
    monkeypatch.setattr(grouped_query, "sdpa_attention", lambda *_: "sdpa")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    context = build_context(5, "cpu", **options)
    with FakeTensorMode():  # tensors of a GPU that is not here
        q, k = (torch.empty(1, heads, 5, 16, dtype=dtype, device="cuda") for heads in (4, groups))
    assert grouped_query.attend("auto", q, k, k, context, SCALE, dropout) == path
    monkeypatch.setattr(flash_triton, "triton", None)
    assert grouped_query.attend("auto", q, k, k, context, SCALE, dropout) == "sdpa"


if __name__ == "__main__":
    in_the_interpreter(sys.argv[1])
