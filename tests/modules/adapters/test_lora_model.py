"""Merging: the same output, the same bits after the way back, and a plain model in the end. The merged weight
against peft's: test_lora.py."""

import copy

import pytest
import torch

from config.adapters import LoraConfig
from model.caches import make_cache
from inference.fast.decoder import FastDecoder, refusal
from modules.adapters.lora_model import add_lora, fold, merge, switch_of, unmerge
from tests.model import test_moe_model
from tests.model.test_tinyseek import text
from tests.modules.adapters.test_adapter_switch import adapted
from tests.modules.adapters.test_lora import freeze_all_but, our_model, shake_adapters
from tests.modules.tools import added
from utils.errors import UserError

MOE = test_moe_model.MOE | {"first_k_dense_replace": 1}


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(before, after):
    return set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["large", "lengths", "attention"])
@torch.no_grad()
def test_merged_and_back(name, dtype):
    """The output stays (in bf16 as far as 8 bits go), the weights come back bit by bit."""
    model, switch = adapted(MOE, dtype)
    ids, before, parameters = text(2, 5), bits(model), [id(p) for p in model.parameters()]
    switch.use(name)
    expected = model(ids).logits
    switch.use(["small", None])
    merge(model, name)
    merged = model(ids).logits
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    if name == "attention":
        assert changed == {key for key in before if key.endswith("o_proj.weight")}
    else:
        assert len(changed) == 2 * 4 + 3 + 5  # attention, dense, shared experts and the two stacks
    if dtype != torch.bfloat16:
        close = {torch.float64: 1e-11, torch.float32: 1e-4}[dtype]
        torch.testing.assert_close(merged, expected, rtol=close, atol=close)
    unmerge(model)
    assert same(before, bits(model)) and switch.choice == ["small", None]
    assert [id(p) for p in model.parameters()] == parameters
    switch.use(name)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_bf16_the_merged_weight_is_the_exact_one_rounded_once(dora, factors):
    model = our_model().bfloat16()
    add_lora(model, LoraConfig(r=4, lora_alpha=1.0, target_modules=["up_proj"], use_dora=dora), "a")
    shake_adapters(model)
    if factors == torch.bfloat16:
        model.bfloat16()
    layer = model.model.layers[0].mlp.up_proj
    W, A, B = layer.weight.double(), layer.lora_A["a"].double(), layer.lora_B["a"].double()
    exact = W + B @ A / 4
    if dora:
        exact *= (layer.lora_magnitude_vector["a"].double() / exact.norm(dim=1))[:, None]
    merge(model, "a")
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.weight != exact.bfloat16()).float().mean() < 0.003  # fp32 falls on the other side at times


def test_a_merged_model_may_be_moved():
    """W follows when it comes back."""
    model, switch = adapted({}, torch.float32)
    wide = bits(copy.deepcopy(model).double())
    merge(model, "small")
    unmerge(model.double())
    assert same(wide, bits(model)) and {p.dtype for p in model.parameters()} == {torch.float64}


def test_what_cannot_be_merged():
    model, switch = adapted({})
    with pytest.raises(UserError, match="nothing to unmerge"):
        unmerge(model)
    for action in (merge, fold):
        with pytest.raises(UserError, match="'no'.*small"):
            action(model, "no")
    merge(model, "small")
    before = bits(model)
    for call in (
        lambda: merge(model, "small"),
        lambda: merge(model, "large"),
        lambda: fold(model, "large"),
        lambda: fold(model, None),
        lambda: switch.use("large"),
        lambda: add_lora(model, LoraConfig(), "new"),
    ):
        with pytest.raises(UserError, match="'small' is merged"):
            call()
    assert same(before, bits(model)) and switch.merged == "small"


def test_the_gate_of_shared_experts_is_a_target_by_its_name_only():
    """Under `mlp`, but no feed-forward."""
    changes = MOE | {"shared_expert_gate": True}
    names = added(add_lora, our_model(**changes), LoraConfig(target_modules=["dense", "shared"]))
    assert len(names) == 2 * (3 + 3) and not any("shared_expert_gate" in name for name in names)
    model, ids = our_model(**changes), text(2, 5)
    names = added(add_lora, model, LoraConfig(target_modules=["shared_expert_gate"]))
    assert all(".mlp.shared_expert_gate.lora_" in name for name in names) and len(names) == 2
    shake_adapters(model)
    expected = model(ids).logits
    assert (expected - our_model(**changes)(ids).logits).abs().max() > 1e-3
    fold(model, "default")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


BIASES = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": True, "shared_expert_gate": True}


@pytest.mark.parametrize("changes", [{}, MOE, MOE | BIASES, test_moe_model.MLA],
                         ids=["dense", "mixture", "biases, gate", "latent"])  # fmt: skip
@pytest.mark.parametrize("name", ["large", "lengths", None])
@torch.no_grad()
def test_folded_it_is_a_plain_model(name, changes):
    """With its own types, parameters and names, and the fast decoder takes it again."""
    model, switch = adapted(changes, torch.float32)
    plain = our_model(**changes)
    parameters = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    ids = text(2, 6)
    switch.use(name)
    expected = model(ids).logits
    assert refusal(model)
    twin = copy.deepcopy(model)
    if name:
        merge(twin, name)
    for folded in (model, twin):  # also one that was merged before
        fold(folded, name)
        torch.testing.assert_close(folded(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
        assert set(folded.state_dict()) == set(plain.state_dict()) and refusal(folded) == refusal(plain)
        assert all(vars(a).keys() == vars(b).keys() for a, b in zip(folded.modules(), plain.modules()))
        with pytest.raises(UserError, match="no adapter"):
            switch_of(folded)
    assert same(parameters, dict(plain.named_parameters()))  # whoever shares the base finds it as it was
    kept = {n for n, p in model.named_parameters() if p is parameters[n]}
    assert "model.norm.weight" in kept and (len(kept) == len(parameters)) == (name is None)
    if not refusal(plain):
        cache = make_cache(model, 1, 6)
        model(ids[:1, :5], cache=cache)
        step = FastDecoder(model).step([int(ids[0, 5])], cache)[0]
        torch.testing.assert_close(step, expected[:1, 5], rtol=1e-3, atol=1e-3)


def test_folding_keeps_what_learns_and_allows_new_adapters():
    model = our_model()
    freeze_all_but(model, added(add_lora, model, LoraConfig(target_modules=["q_proj"])))
    merge(model, "default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    fold(model, "default")
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    assert len(added(add_lora, model, LoraConfig(target_modules=["q_proj"]))) == 4
    fold(model, "default")
    assert all(p.requires_grad for p in model.parameters())
