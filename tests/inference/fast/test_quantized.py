"""The fast decoder of quantised models against their plain path, which dequantises."""

import pytest
import torch

from config.quant import QuantConfig
from inference.fast import quantized
from inference.fast.decoder import FastDecoder, refusal
from inference.fast.quantized import QuantMatrix
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.caches import make_cache
from model.quantized import quantize_weights
from model.tinyseek import TinySeek
from modules.quantized.kernels import Int8Product
from modules.quantized.layers import QuantExperts, QuantLinear
from tests.inference.fast.test_decoder import some_tokens
from tests.modules.tools import shake, small_config

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
MOE = {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 32}
DENSE = {"attention_bias": True, "mlp_bias": True}
QUANTS = {
    "int8": {"method": "rtn", "bits": 8},
    "int8, head": {"method": "rtn", "bits": 8, "head": True},
    "awq, 8 bits": {"method": "awq", "bits": 8},
    "int4": {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False},
    "nf4": {"method": "nf4", "bits": 4, "double_quant": True},
    "smoothquant": {"method": "smoothquant", "bits": 8},
}
# Of the largest logit. int8: fp32's rounding. int4: each of 8 products rounds to bf16, 2^-8. nf4: to fp16,
# 2^-11. An input rounded to 8 bits that lies between two codes may go either way, and moves by 2^-7.
TOLERANCE = {"int8": 1e-4, "int8, head": 1e-4, "awq, 8 bits": 1e-4, "int4": 5e-2, "nf4": 5e-3,
             "smoothquant": 1e-1}  # fmt: skip


def build(name, **changes):
    """A quantised model with random weights, gains and biases, and input scales where the method has any."""
    model = shake(TinySeek(small_config(**SHAPE | changes)), 1).eval()
    quantize_weights(model, QuantConfig(**QUANTS[name]))
    generator = torch.Generator().manual_seed(3)
    for part in model.modules():
        for name in ("input_scale", "inner_scale") if isinstance(part, QuantLinear | QuantExperts) else ():
            if getattr(part, name, None) is not None:
                getattr(part, name).uniform_(0.5, 2.0, generator=generator)
    return model


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(quantized, "SMALL", 0)


@torch.inference_mode()
@pytest.mark.parametrize("experts", [DENSE, MOE], ids=["dense with biases", "experts"])
@pytest.mark.parametrize("name", QUANTS)
def test_same_logits(name, experts):
    """One row, then three of different lengths; the cache too."""
    model = build(name, **experts)
    assert not refusal(model, 1) and not refusal(model, 3)
    fast, tokens = FastDecoder(model), torch.tensor(some_tokens(3 * 12)).view(3, 12)
    exact, differences = TOLERANCE[name] == 1e-4, []
    for rows in (1, 3):
        caches = [make_cache(model, rows, 20) for _ in range(2)]
        for cache in caches:
            model(tokens[:rows, :4], cache=cache, new_tokens=[4, 2, 3][:rows])
        for step in range(4, 12):
            expected = model(tokens[:rows, step : step + 1], cache=caches[0]).logits[:, 0]
            found = fast.step(tokens[:rows, step].tolist(), caches[1])[0]
            differences += ((found - expected).abs().amax(1) / expected.abs().max()).tolist()
            caches[1].store.copy_(caches[0].store)  # a difference does not grow from token to token
    differences.sort()
    assert differences[len(differences) // 2] <= TOLERANCE[name] / 4
    if experts is DENSE or exact:  # else rounding may decide a near tie between experts
        assert differences[-1] <= TOLERANCE[name]


@torch.inference_mode()
@pytest.mark.parametrize("small", [0, 2**20])
def test_inputs_are_rounded_before_matrices_of_any_size(monkeypatch, small):
    """In fp64 both paths round the same numbers, so they agree as closely as fp32's scales let them."""
    monkeypatch.setattr(quantized, "SMALL", small)
    model = build("smoothquant", **DENSE).double()
    tokens, caches = some_tokens(8), [make_cache(model, 1, 8) for _ in range(2)]
    fast = FastDecoder(model)
    for token in tokens:
        expected = model(torch.tensor([[token]]), cache=caches[0]).logits[0, 0]
        found = fast.step([token], caches[1])[0][0]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def texts(model, fast, prompts):
    """The greedy answers to some prompts, and the engine."""
    generator = Generator(model, fast=fast)
    params = SamplingParams(temperature=0.0, max_new_tokens=24)
    return [list(answer) for answer in generator.generate(prompts, params, stop_ids=set())], generator


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_greedy_text_is_that_of_the_plain_path(name, rows):
    """Token for token, up to the first one whose two best logits lie within the rounding of the format."""
    model = build(name, **DENSE)
    prompts = [some_tokens(5, seed) for seed in range(rows)]
    (ours, engine), (plain, _) = texts(model, True, prompts), texts(model, False, prompts)
    assert engine.why_plain == ""
    agreed = 0
    for prompt, left, right in zip(prompts, ours, plain, strict=True):
        logits = model(torch.tensor([prompt + right])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * TOLERANCE[name] * logits.abs().max()
        first = next((i for i in range(24) if not clear[i]), 24)
        assert left[:first] == right[:first]
        agreed += first
    assert agreed >= (12 * rows if name == "int8" else 1)


def matrices(fast):
    """All matrices of a decoder, by what holds them."""
    for attention, mlp in fast.layers:
        yield from (attention.qkv, attention.out)
        for part in (mlp.shared, *mlp.each) if hasattr(mlp, "each") else (mlp,):
            yield from part if isinstance(part, tuple) else (part.gate_up, part.down)


@pytest.mark.parametrize("experts", [DENSE, MOE], ids=["dense", "experts"])
def test_large_matrices_stay_in_few_bits(monkeypatch, experts):
    """Small ones are fp32; so is everything for a model in fp64, whose products are."""
    model = build("int8", **experts)
    for matrix in matrices(FastDecoder(model)):
        assert type(matrix) is QuantMatrix and all(type(part[0]) is Int8Product for part in matrix.parts)
    monkeypatch.setattr(quantized, "SMALL", 2**20)
    assert all(type(matrix) is torch.Tensor for matrix in matrices(FastDecoder(model)))
    monkeypatch.setattr(quantized, "SMALL", 0)
    assert all(type(matrix) is torch.Tensor for matrix in matrices(FastDecoder(model.double())))


def test_matrices_with_one_input_are_one_product():
    """Unless each has an input scale of its own."""
    assert len(FastDecoder(build("int8")).layers[0][0].qkv.parts) == 1
    model = build("awq, 8 bits")
    assert len(FastDecoder(model).layers[0][0].qkv.parts) == 3
    attention = model.model.layers[0].self_attn
    for linear in (attention.k_proj, attention.v_proj):
        linear.input_scale.copy_(attention.q_proj.input_scale)
    assert len(FastDecoder(model).layers[0][0].qkv.parts) == 1


def test_inputs_are_rounded_where_the_layer_rounds_them():
    """Bias aside, the matrix is the layer; without rounding it would differ by half a percent."""
    layer = build("smoothquant").model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    found, expected = quantized.quantized_linears([layer], torch.float32)(x), layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
