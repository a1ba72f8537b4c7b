"""The fast path against the plain one: logits and cache after every token."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from inference.fast.decoder import FastDecoder, decoders, refusal
from inference.fast.layer import FastMoE, even_rows
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.caches import make_cache
from model.tinyseek import TinySeek
from modules.attention.grouped_query import GroupedQueryAttention
from modules.experts.moe import MoE as Experts
from modules.experts.router import TopkRouter
from modules.mlp import SwiGLU
from modules.norm import RMSNorm
from tests.modules.tools import shake, small_config

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 20}
EXPERTS = {
    "experts": MOE,
    "softmax, no shared expert": MOE | {"scoring_func": "softmax", "n_shared_experts": 0},
    "weights not normalised": MOE | {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "softmax, not normalised, one chosen": MOE
    | {"scoring_func": "softmax", "norm_topk_prob": False, "num_experts_per_tok": 1},
    "scaled, first layer dense": MOE | {"routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
    "all chosen, large eps": MOE | {"num_experts_per_tok": 6, "rms_norm_eps": 0.3},
    "one expert": MOE | {"n_routed_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "gated shared expert, second layer dense": MOE
    | {"shared_expert_intermediate_size": 27, "shared_expert_gate": True, "mlp_only_layers": [1]}
    | {"mlp_bias": True},
}
SHAPES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA": {"num_key_value_heads": 1},
    "one head, one layer": {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1},
    "no QK-norm": {"qk_norm": False},
    "large eps": {"rms_norm_eps": 0.3},
    "interleaved": {"rope_interleaved": True, "num_key_value_heads": 4},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "untied": {"tie_word_embeddings": False},
    "half of the channels rotate": {"partial_rotary_factor": 0.5},
    "a quarter rotates, interleaved": {"partial_rotary_factor": 0.25, "rope_interleaved": True},
    "Llama's biases": {"attention_bias": True, "mlp_bias": True, "qk_norm": False},
    "Qwen2's biases": {"attention_bias": True, "attention_out_bias": False, "qk_norm": False},
    "bias on o alone": {"attention_out_bias": True},
}
UNSUPPORTED = {
    "window": {"sliding_window": 4},
    "dual chunks": {"dual_chunk_attention_config": {"chunk_size": 7, "local_size": 2}},
    "pattern": {"sliding_window": 4, "sliding_window_pattern": 2},
    "types of layers": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "sinks": {"sliding_window": 4, "attention_sinks": 2},
    "soft cap": {"final_logit_softcapping": 3.0},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    "longrope": {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4,
                                  "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}},
    "groups of experts": MOE | {"n_group": 3, "topk_group": 2},
    "groups by their best": MOE | {"n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "MLA": {"attention_kind": "mla"},
}
TOLERANCE = {  # of logits whose standard deviation is 1 to 3
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.bfloat16: 0.5,  # the plain path rounds every activation: its own error is up to 0.2
}


def build(dtype, seed=1, **changes):
    """Random weights, gains and, where there are experts, biases of their choice."""
    model = shake(TinySeek(small_config(**changes)), seed)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


def some_tokens(number, seed=2):
    return torch.randint(0, 61, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


def wide(dtype):
    """What the fast path computes in."""
    return torch.promote_types(dtype, torch.float32)


def close(ours, expected, dtype):
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=TOLERANCE[dtype], rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for name in SHAPES for dtype in TOLERANCE]
    + [(name, dtype) for name in EXPERTS for dtype in (torch.float64, torch.float32)],
)
def test_same_logits_and_same_cache(name, dtype):
    """In bf16 a near tie between experts is decided by rounding: see the test after this one."""
    model = build(dtype, **(SHAPES | EXPERTS)[name])
    assert not refusal(model)
    fast = FastDecoder(model)
    caches = [make_cache(model, 1, 40) for _ in range(2)]
    tokens = some_tokens(40)
    for cache in caches:
        model(torch.tensor([tokens[:3]]), cache=cache)
    for token in tokens[3:]:
        expected = model(torch.tensor([[token]]), cache=caches[0]).logits[:, 0]
        logits = fast.step([token], caches[1])[0]
        assert logits.shape == expected.shape and logits.dtype == wide(dtype)
        close(logits, expected, dtype)
    assert caches[1].lengths == caches[0].lengths == [40]
    close(caches[1].store, caches[0].store, dtype)


@torch.inference_mode()
@pytest.mark.parametrize(
    "name, dtype", [(name, torch.float64) for name in SHAPES | EXPERTS] + [("experts", torch.float32)]
)
def test_many_rows_of_different_lengths(name, dtype):
    """Logits, cache and experts after every token. Rows end, one with a full cache, and stay as they are;
    then some leave and others are doubled, down to a single row."""
    model = build(dtype, **(SHAPES | EXPERTS)[name])
    fast, caches = FastDecoder(model), [make_cache(model, 5, 20) for _ in range(2)]
    prompts, lengths = torch.tensor(some_tokens(5 * 14)).view(5, 14), [3, 14, 1, 6, 6]
    for cache in caches:
        model(prompts, cache=cache, new_tokens=lengths)
    tokens = iter(some_tokens(200))
    for step in range(16):
        if step in (8, 11, 13):
            for cache in caches:
                cache.select({8: [3, 0, 0, 4, 2, 2, 3, 0, 1], 11: [5, 1], 13: [0]}[step])
        lengths = caches[0].lengths
        B, ended = len(lengths), 3 if step % 3 else None
        new = [int(length < 20 and row != ended) for row, length in enumerate(lengths)]
        ids, new = [next(tokens) for _ in range(B)], None if all(new) and step % 2 else new
        output = model(torch.tensor(ids)[:, None], cache=caches[0], new_tokens=new)
        logits, routings = fast.step(ids, caches[1], new, record=True)
        go = torch.tensor(new or [1] * B).bool()
        close(logits[go], output.logits[go, 0], dtype)
        assert caches[1].lengths == caches[0].lengths and len(routings) == len(output.routings)
        for ours, expected in zip(routings, output.routings, strict=True):
            assert torch.equal(ours.indices[go].sort().values, expected.indices[go].sort().values)
        for row, length in enumerate(caches[0].lengths):
            parts = [cache.store[:, :, row, :, :length] for cache in caches]
            close(*parts, dtype)
    assert go.tolist() == [True]


@pytest.mark.parametrize("N, E, K", [(1, 1, 1), (2, 4, 2), (7, 3, 2), (40, 8, 2), (30, 6, 6), (3, 16, 4)])
@pytest.mark.parametrize("crowded", [False, True])
def test_even_rows(N, E, K, crowded):
    """Each assignment has a row of its own among those of its expert, which holds its token."""
    scores = torch.rand(N, E, generator=torch.Generator().manual_seed(N))
    scores[:, 0] += crowded
    indices = scores.topk(K).indices
    busiest, mean = indices.flatten().bincount().max().item(), N * K / E
    if mean < 1 or busiest > 3 * mean + 8:
        assert even_rows(indices, E) is None
        return
    position, token = even_rows(indices, E)
    assert busiest <= token.shape[1] <= N and token.shape[1] < busiest + 8
    assert position.unique().numel() == N * K and torch.equal(position // token.shape[1], indices)
    assert torch.equal(token.flatten()[position], torch.arange(N)[:, None].expand(N, K))


@torch.inference_mode()
@pytest.mark.parametrize("favour", [0.0, 9.0])
@pytest.mark.parametrize("rows", [2, 3, 40])
def test_idle_and_crowded_experts(rows, favour):
    """One expert has no row at all; the other extreme, with 9: one takes every row."""
    model = build(torch.float64, **MOE)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias[1] = -9
        layer.mlp.gate.e_score_correction_bias[4] += favour
    fast, caches = FastDecoder(model), [make_cache(model, rows, 2) for _ in range(2)]
    for tokens in torch.tensor(some_tokens(2 * rows)).view(2, rows):
        output = model(tokens[:, None], cache=caches[0])
        logits, routings = fast.step(tokens.tolist(), caches[1])
        close(logits, output.logits[:, 0], torch.float64)
        chosen = routings[0].indices.flatten().bincount(minlength=6)
        assert chosen[1] == 0 and (chosen[4] == rows or not favour)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["experts", "weights not normalised", "all chosen, large eps"])
def test_bf16_with_experts_is_nearer_to_the_exact_answer_than_the_plain_path(name):
    """Exact: the same weights, which bf16 holds, computed in fp64 throughout."""
    model = build(torch.bfloat16, **EXPERTS[name])
    exact = copy.deepcopy(model).double()
    fast, errors = FastDecoder(model), {"fast": [], "plain": []}
    caches = [make_cache(model, 1, 40), make_cache(model, 1, 40), make_cache(exact, 1, 40)]
    for token in some_tokens(40):
        ids = torch.tensor([[token]])
        expected = exact(ids, cache=caches[2]).logits[:, 0]
        errors["fast"].append((fast.step([token], caches[0])[0] - expected).abs().mean().item())
        errors["plain"].append((model(ids, cache=caches[1]).logits[:, 0] - expected).abs().mean().item())
    medians = {path: sorted(values)[20] for path, values in errors.items()}
    assert medians["fast"] < 0.7 * medians["plain"] and medians["fast"] < 0.03


@torch.inference_mode()
def test_what_is_handed_out_stays():
    """Later calls do not overwrite earlier answers, of one row or of several."""
    model = build(torch.float64, **MOE)
    for rows in (1, 3):
        fast, cache = FastDecoder(model), make_cache(model, rows, 20)
        logits, routings = fast.step([3] * rows, cache, record=True)
        handed_out = [logits, *(tensor for routing in routings for tensor in routing)]
        before = [tensor.clone() for tensor in handed_out]
        fast.step([9] * rows, cache, record=True)
        assert len(routings) == 2 and all(map(torch.equal, handed_out, before))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_copy_does_not_follow_later_training(dtype):
    """All weights and biases change in place; the plain path of an unchanged copy says what must come out.

    Nothing but a copy of a weight that has the decoder's dtype and layout already would do.
    """
    biased = {"attention_bias": True, "mlp_bias": True, "shared_expert_gate": True}
    model = build(dtype, **MOE | {"tie_word_embeddings": False, "first_k_dense_replace": 1} | biased)
    fast, before = FastDecoder(model), copy.deepcopy(model)
    for weight in model.state_dict().values():
        weight.add_(0.5)
    cache = make_cache(model, 1, 4)
    logits = torch.cat([fast.step([token], cache)[0] for token in (7, 8)])
    close(logits, before(torch.tensor([[7, 8]])).logits[0], dtype)


def test_threads_may_share_a_decoder():
    """Each writes into a cache of its own; the memory between is the same."""
    model = build(torch.float64, **MOE)
    fast, texts = FastDecoder(model), [some_tokens(40, seed) for seed in range(4)]

    def last_logits(text):
        cache = make_cache(model, 1, 40)
        return [fast.step([token], cache)[0] for token in text][-1]

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(last_logits, texts))
    assert all(torch.equal(one, last_logits(text)) for one, text in zip(together, texts, strict=True))


def test_an_edit_that_shows_in_several_rows_only_is_noticed(monkeypatch):
    real = FastMoE.add_many
    monkeypatch.setattr(FastMoE, "add_many", lambda self, hidden, normed: real(self, hidden, 1.1 * normed))
    with pytest.warns(UserWarning, match="plain path"):
        assert Generator(build(torch.float64, **MOE)).fast_decoder(4) is None


@torch.inference_mode()
@pytest.mark.parametrize("name", EXPERTS)
def test_greedy_text_is_that_of_the_plain_path(name):
    model = build(torch.float64, **EXPERTS[name])
    params = SamplingParams(temperature=0, max_new_tokens=40)
    for prompt in ([5], [9, 30, 2, 2]):
        texts = [Generator(model, fast=fast).generate([prompt], params) for fast in (True, False)]
        assert texts[0] == texts[1] and len(texts[0][0]) == 40


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_of_experts_is_made_in_fp32(dtype):
    """Two tokens that bf16 cannot tell apart take different experts, as in the router itself."""
    model = build(dtype, **MOE | {"num_experts_per_tok": 1, "norm_topk_prob": False})
    layer = model.model.layers[0]
    layer.mlp.gate.e_score_correction_bias.zero_()
    layer.post_attention_layernorm.weight.fill_(1)
    weight = layer.mlp.gate.weight
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).mul(0.02))
    weight[3:5], weight[3, 0], weight[4, 1] = 2**-4, 2**-3, 2**-3
    _, router = FastDecoder(model).layers[0]
    normed = torch.ones(2, 24)
    normed[0, 0] = normed[1, 1] = 1 + 2**-12  # in bf16 both rows are ones
    ours = [router.route(row[None] / 24**0.5)[0][0] for row in normed]
    assert ours == [3, 4]
    assert layer.mlp.gate(normed).indices[:, 0].tolist() == [3, 4]


@torch.inference_mode()
def test_paths_may_take_turns_and_go_back():
    """Plain, fast, crop (rejected drafts), fast, plain: the cache belongs to both."""
    model = build(torch.float64)
    fast, cache = FastDecoder(model), make_cache(model, 1, 20)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    for token in (1, 2, 3, 4):
        fast.step([token], cache)
    cache.crop([5])
    fast.step([9], cache)
    ours = model(torch.tensor([[10, 11]]), cache=cache).logits[0, -1]
    whole = model(torch.tensor([[5, 6, 7, 1, 2, 9, 10, 11]])).logits[0, -1]
    torch.testing.assert_close(ours, whole, atol=1e-12, rtol=0)


def test_several_rows_of_a_bf16_model_take_the_plain_path():
    """Their products need no fp32 copy."""
    generator, params = Generator(build(torch.bfloat16)), SamplingParams(max_new_tokens=2)
    generator.generate([[5], [6]], params)
    assert "dtype of the model" in generator.why_plain
    generator.generate([[5]], params)
    assert generator.why_plain == ""


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_it_does_not_know_takes_the_plain_path(name):
    model = build(torch.float64, **UNSUPPORTED[name])
    assert refusal(model) and Generator(model).fast_decoder() is None
    assert Generator(build(torch.float64)).fast_decoder() is not None
    assert Generator(build(torch.float64), fast=False).fast_decoder() is None


def test_another_part_in_the_model_takes_the_plain_path():
    """An adapter, a subclass, a parametrisation: any weight or type that is not known."""

    class Adapted(nn.Linear):
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features, bias=False)
            self.weight, self.lora_A = linear.weight, nn.Parameter(torch.zeros(2, linear.in_features))

    class Other(TinySeek):
        pass

    adapted = build(torch.float64)
    adapted.model.layers[1].self_attn.q_proj = Adapted(adapted.model.layers[1].self_attn.q_proj)
    assert refusal(adapted)
    hidden = build(torch.float64)  # a changed part with the same weights: an nn.Linear that does more
    hidden.model.layers[0].mlp.down_proj.__class__ = type("Scaled", (nn.Linear,), {})
    assert refusal(hidden)
    assert refusal(Other(small_config()))
    parametrised = build(torch.float64)
    nn.utils.parametrizations.weight_norm(parametrised.model.layers[0].mlp.up_proj)
    assert refusal(parametrised)


def test_the_end_of_cache_and_context_is_an_error():
    model = build(torch.float64)
    fast = FastDecoder(model)
    for capacity, longest in ((4, 4), (100, 64)):
        cache = make_cache(model, 1, capacity)
        for _ in range(longest):
            fast.step([1], cache)
        with pytest.raises(ValueError, match=f"no place for token {longest}"):
            fast.step([1], cache)
        assert cache.lengths == [longest]


@torch.inference_mode()
@pytest.mark.parametrize("experts", [{}, MOE])
@pytest.mark.parametrize("rows, most", [(1, 1 / 2), (8, 2 / 3)])
def test_it_makes_far_fewer_calls(experts, rows, most):
    """A small model spends its time on the way to PyTorch's kernels: one row takes half as many at most."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    model = build(torch.float32, **experts)
    fast, caches = FastDecoder(model), [make_cache(model, rows, 4) for _ in range(2)]
    fast.step([1] * rows, caches[0])
    model(torch.tensor([[1]] * rows), cache=caches[1])
    with Count() as ours:
        fast.step([2] * rows, caches[0])
    with Count() as plain:
        model(torch.tensor([[2]] * rows), cache=caches[1])
    assert ours.calls < most * plain.calls


CHANGES = {  # edits that a student may make in modules/: the types and the weights stay the same
    "attention": (GroupedQueryAttention, lambda out: 1.05 * out),
    "feed-forward": (SwiGLU, lambda out: out.clamp(-0.5, 0.5)),
    "experts": (Experts, lambda out: (out[0] * 0.9, out[1])),
    "router": (TopkRouter, lambda out: out._replace(weights=out.weights.sqrt())),
    "norm": (RMSNorm, lambda out: out - out.mean(dim=-1, keepdim=True)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_forward_takes_the_plain_path(monkeypatch, name, dtype):
    """Before the fast path is used, it must agree with the plain one on a few tokens."""
    part, change = CHANGES[name]
    model = build(dtype, **MOE | {"first_k_dense_replace": 1})
    generator, params = Generator(model), SamplingParams(temperature=0, max_new_tokens=8)
    assert generator.fast_decoder() is not None and generator.why_plain == ""
    real = part.forward
    monkeypatch.setattr(part, "forward", lambda *args, **kwargs: change(real(*args, **kwargs)))
    assert not refusal(model)
    with pytest.warns(UserWarning, match="plain path"):  # the generator notices, too, after it has prepared
        text = generator.generate([[5, 6]], params)
    assert generator.decoder is None and generator.why_plain == "logits differ"
    assert text == Generator(model, fast=False).generate([[5, 6]], params)
    monkeypatch.undo()
    assert generator.fast_decoder() is not None


def test_a_doubled_scale_of_attention_is_noticed(monkeypatch):
    """Scores, and not outputs: with one token alone nothing would differ."""
    real = GroupedQueryAttention.forward

    def doubled(self, *args):
        self.q_norm.weight.data.mul_(2)
        out = real(self, *args)
        self.q_norm.weight.data.mul_(0.5)
        return out

    model = build(torch.float32)
    monkeypatch.setattr(GroupedQueryAttention, "forward", doubled)
    with pytest.warns(UserWarning, match="plain path"):
        assert Generator(model).fast_decoder() is None


def test_hooks_and_own_forwards_take_the_plain_path():
    """They fire at every token, as they do in the plain path."""
    model, fired = build(torch.float64), []
    generator, params = Generator(model), SamplingParams(temperature=0, max_new_tokens=8)
    layer = model.model.layers[0]
    for add in (layer.mlp.register_forward_hook, layer.register_forward_pre_hook,
                nn.modules.module.register_module_forward_hook):  # fmt: skip
        assert generator.fast_decoder() is not None
        hook = add(lambda *args: fired.append(args))
        fired.clear()
        generator.generate([[5, 6]], params)
        assert len(fired) >= 8 and "hooks" in generator.why_plain
        hook.remove()
    layer.mlp.forward = lambda hidden: hidden
    assert generator.fast_decoder() is None and "layers.0.mlp has hooks or a forward" in generator.why_plain


def test_generators_of_a_model_share_one_copy():
    """The copy goes with the last of them."""
    model = build(torch.float64, mtp="parallel")
    one, two, other = Generator(model), Generator(model), Generator(build(torch.float64))
    assert one.fast_decoder() is two.fast_decoder() is not other.fast_decoder()
    copies = len(decoders)
    del one, two
    gc.collect()
    assert len(decoders) == copies - 1


def test_a_changed_setting_is_noticed():
    """Routers read the configuration in each forward, so the prepared decoder must not outlive it."""
    model = build(torch.float64, **MOE)
    generator = Generator(model)
    generator.fast_decoder()
    model.config.num_experts_per_tok = 2
    caches = [make_cache(model, 1, 4) for _ in range(2)]
    with torch.inference_mode():
        expected = model(torch.tensor([[5]]), cache=caches[0]).logits[:, 0]
        close(generator.fast_decoder().step([5], caches[1])[0], expected, torch.float64)
