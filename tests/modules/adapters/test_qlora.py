"""Adapters beside NF4 against peft's on bitsandbytes' `Linear4bit`, and what a backward pass keeps."""

import copy

import pytest
import torch
from torch import nn

from config.adapters import LoraConfig
from model.adapters import NF4
from model.quantized import dequantize_weights, quantize_weights
from model.tinyseek import TinySeek
from modules.adapters.lora_model import add_lora, fold, switch_of
from modules.adapters.qlora import LoraQuantLinear
from modules.experts.moe import loop_experts
from modules.quantized.layers import QuantExperts, QuantLinear
from modules.quantized.stored import StoredIntegers, StoredNF4
from tests.modules.adapters.test_lora import KINDS, Net, same_gradients, shake_adapters, with_peft
from tests.modules.tools import added, shake, small_config
from utils.errors import UserError


def on_codes(net: Net, double=True) -> Net:
    """The same with its matrix in NF4."""
    store = StoredNF4(net.proj.weight.shape, double).round(net.proj.weight)
    net.proj = QuantLinear(store, net.proj.bias)
    return net


def on_theirs(net: Net) -> Net:
    """The same on bitsandbytes' codes, as transformers leaves a model for peft."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight, bias = net.proj.weight.detach(), net.proj.bias
    form = {"quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(*weight.T.shape, compute_dtype=torch.float32, **form)
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, **form)
    layer.bias.data.copy_(bias)
    net.proj, net.is_loaded_in_4bit = layer.to("cpu"), True
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_pefts_on_bitsandbytes(kind):
    """Rows of 70 numbers: blocks of 64 run over their ends. The bound: sums of 70 products in fp32."""
    net = shake(Net(70, 12), seed=5)
    ours, theirs = on_codes(copy.deepcopy(net)), on_theirs(net)
    settings = {"r": 3, "lora_alpha": 3.0, **KINDS[kind]}
    names = added(add_lora, ours, LoraConfig(**settings, target_modules=["proj"]))
    assert isinstance(ours.proj, LoraQuantLinear) and all("lora_" in name for name in names)
    shake_adapters(ours)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name in names)
    theirs, pairs = with_peft(theirs, ours, ["proj"], **settings)
    same_gradients(ours, theirs, pairs, torch.randn(2, 5, 70), 1e-4)


def quantised_model(**changes) -> TinySeek:
    """A small mixture on NF4."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
               "moe_intermediate_size": 8}  # fmt: skip
    return quantize_weights(shake(TinySeek(small_config(**experts, **changes))), NF4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_on_codes_is_the_plain_one_on_their_numbers(dora):
    """Logits and gradients of every factor, in all groups of linear layers; fold gives the same again."""
    codes = quantised_model()
    plain = dequantize_weights(copy.deepcopy(codes))
    config = LoraConfig(r=2, use_dora=dora, target_modules=["attention", "dense", "shared"])
    ids, found = torch.randint(0, 40, (2, 9)), []
    for model in (codes, plain):
        add_lora(model, config)
        if model is codes:
            shake_adapters(model, scale=0.1)
        factors = {name: part for name, part in codes.state_dict().items() if "lora_" in name}
        model.load_state_dict(factors, strict=False)
        logits = model(ids).logits
        logits.logsumexp(-1).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
        found.append((logits, grads))
    (logits, grads), (expected, theirs) = found
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert grads.keys() == theirs.keys() and len(grads) > 20
    for name, grad in grads.items():
        assert grad.any(), name
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-4)
    fold(plain, "default")
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_no_matrix_in_full_is_kept_for_the_backward_pass(monkeypatch):
    """Each is computed once in the forward pass and once more in the backward pass."""
    counts, kept, plain = [], [], StoredNF4.dequantize
    monkeypatch.setattr(StoredNF4, "dequantize", lambda store: counts.append(store.shape) or plain(store))
    layer = on_codes(Net(64, 48, bias=False)).proj
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert len(counts) == 1 and not kept
    y.sum().backward()
    assert len(counts) == 2

    shapes, counts[:] = [(4, 6, 8), (4, 8, 3)], []
    experts = QuantExperts(*(StoredNF4(s).round(torch.randn(s)) for s in shapes), "grouped")
    x, weights = torch.randn(9, 8, requires_grad=True), torch.rand(9, 2)
    y = experts(x, torch.randint(0, 4, (9, 2)), weights)
    assert len(counts) == 2
    y.sum().backward()
    assert sorted(map(tuple, counts)) == sorted(2 * shapes) and x.grad.any()


def test_gradients_of_experts_are_those_of_a_loop():
    """Both paths against the reference on plain numbers."""
    shapes = {(4, 8, 8): 4, (4, 8, 4): 8}
    stores = [StoredIntegers(shape, bits).round(torch.randn(shape)) for shape, bits in shapes.items()]
    x, indices, weights = torch.randn(9, 8), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    upstream, found = torch.randn(9, 8), []
    for path in ("grouped", "loop", None):
        ours = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        run = QuantExperts(*stores, path) if path else None
        matrices = [store.dequantize() for store in stores]
        y = run(ours[0], indices, ours[1]) if path else loop_experts(ours[0], indices, ours[1], *matrices)
        y.backward(upstream)
        found.append((y, ours[0].grad, ours[1].grad))
    for mine in found[:2]:
        torch.testing.assert_close(mine, found[2], rtol=1e-4, atol=1e-5)


def test_refusals_are_one_line():
    model = quantised_model()
    with pytest.raises(UserError, match="codes stay as they are: take experts out"):
        add_lora(model, LoraConfig(base="nf4", target_modules=["attention", "experts"]))
    add_lora(model, LoraConfig(r=2))
    with pytest.raises(UserError, match="not merged into codes"):
        fold(model, "default")
    switch_of(model).use(None)
    ids = torch.randint(0, 40, (1, 5))
    torch.testing.assert_close(model(ids).logits, quantised_model()(ids).logits, rtol=0, atol=0)


def test_a_row_of_zeros_has_no_direction_on_codes_either():
    net = Net(64, 3, bias=False)
    net.proj.weight.data[1] = 0
    net = on_codes(net, double=False)
    with pytest.raises(UserError, match="row of zeros"):
        add_lora(net, LoraConfig(target_modules=["proj"], use_dora=True))


def test_activations_are_rounded_under_an_adapter_too():
    """The product is that of the layer."""
    layer = QuantLinear(StoredIntegers((3, 8), 8).round(torch.randn(3, 8)), activations=True)
    model, x = nn.Sequential(layer), torch.randn(4, 8)
    expected = layer(x)
    add_lora(model, LoraConfig(target_modules=["0"]))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
