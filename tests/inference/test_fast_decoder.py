"""The fast path against the plain one: logits and cache after every token."""

import pytest
import torch
from torch import nn

from inference.fast_decoder import FastDecoder, supports
from inference.generate import Generator
from inference.sampling import SamplingParams
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config

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
}
UNSUPPORTED = {
    "bias": {"attention_bias": True},
    "window": {"sliding_window": 4},
    "soft cap": {"final_logit_softcapping": 3.0},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
}
TOLERANCE = {  # of logits whose standard deviation is 1 to 3
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.bfloat16: 0.25,
}


def build(dtype, **changes):
    return shake(TinySeek(small_config(**changes)), 1).to(dtype).eval()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_same_logits_and_same_cache(name, dtype):
    model = build(dtype, **SHAPES[name])
    assert supports(model)
    fast = FastDecoder(model)
    caches = [model.make_cache(1, 40) for _ in range(2)]
    tokens = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    for cache in caches:
        model(torch.tensor([tokens[:3]]), cache=cache)
    for token in tokens[3:]:
        expected = model(torch.tensor([[token]]), cache=caches[0]).logits[:, 0]
        logits = fast.step(token, caches[1])
        assert logits.shape == expected.shape and logits.dtype == dtype
        torch.testing.assert_close(logits, expected, atol=TOLERANCE[dtype], rtol=0)
    assert caches[1].lengths == caches[0].lengths == [40]
    torch.testing.assert_close(caches[1].store, caches[0].store, atol=TOLERANCE[dtype], rtol=0)


@torch.inference_mode()
def test_paths_may_take_turns_and_go_back():
    """Plain, fast, crop (rejected drafts), fast, plain: the cache belongs to both."""
    model = build(torch.float64)
    fast, cache = FastDecoder(model), model.make_cache(1, 20)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    for token in (1, 2, 3, 4):
        fast.step(token, cache)
    cache.crop([5])
    fast.step(9, cache)
    ours = model(torch.tensor([[10, 11]]), cache=cache).logits[0, -1]
    whole = model(torch.tensor([[5, 6, 7, 1, 2, 9, 10, 11]])).logits[0, -1]
    torch.testing.assert_close(ours, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_it_does_not_know_takes_the_plain_path(name):
    model = build(torch.float64, **UNSUPPORTED[name])
    assert not supports(model) and Generator(model).fast_decoder() is None
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
    assert not supports(adapted)
    hidden = build(torch.float64)  # a changed part with the same weights: an nn.Linear that does more
    hidden.model.layers[0].mlp.down_proj.__class__ = type("Scaled", (nn.Linear,), {})
    assert not supports(hidden)
    assert not supports(Other(small_config()))
    parametrised = build(torch.float64)
    nn.utils.parametrizations.weight_norm(parametrised.model.layers[0].mlp.up_proj)
    assert not supports(parametrised)


def test_the_end_of_cache_and_context_is_an_error():
    model = build(torch.float64)
    fast = FastDecoder(model)
    for capacity, longest in ((4, 4), (100, 64)):
        cache = model.make_cache(1, capacity)
        for _ in range(longest):
            fast.step(1, cache)
        with pytest.raises(ValueError, match=f"no place for token {longest}"):
            fast.step(1, cache)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_faster(dtype):
    """Medians of five turns at the shape of the benchmark; 2.5 is usual, 1.5 leaves room for noise."""
    import statistics
    import time

    config = small_config(
        vocab_size=6400, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, intermediate_size=768, max_position_embeddings=256,
    )  # fmt: skip
    model = TinySeek(config).to(dtype)
    seconds = {True: [], False: []}
    generators = {fast: Generator(model, fast=fast) for fast in seconds}
    for _ in range(6):
        for fast, generator in generators.items():
            start = time.perf_counter()
            generator.generate([[5]], SamplingParams(temperature=0, max_new_tokens=100))
            seconds[fast].append(time.perf_counter() - start)
    assert statistics.median(seconds[False][1:]) > 1.5 * statistics.median(seconds[True][1:])
