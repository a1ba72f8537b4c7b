"""Adapters on stacked experts against a loop over tokens and experts in fp64. Against peft: test_lora.py."""

import pytest
import torch

from config.adapters import LoraConfig
from modules.adapters.lora_model import add_lora
from modules.experts.moe import Experts
from tests.modules.adapters.test_lora import KINDS, freeze_all_but, settings_of, shake_adapters
from tests.modules.experts.test_moe import slow_experts
from tests.modules.tools import added, shake

E, C, F, K, R = 5, 6, 4, 2, 3


def experts(kind="LoRA", path="auto", seed=0, **more):
    """Five experts in fp64 with random weights and factors, and the names of these."""
    model = torch.nn.Sequential(shake(Experts(E, C, F, path), seed).double())
    names = added(add_lora, model, LoraConfig(**settings_of(kind, R, **more), target_modules=["experts"]))
    shake_adapters(model)
    return model, names


def inputs(N, idle=()):
    torch.manual_seed(N)
    scores = torch.rand(N, E)
    scores[:, list(idle)] = -1
    x = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(N, K, dtype=torch.float64).requires_grad_()
    return x, scores.topk(K).indices, weights


def slow_weight(stack, name, kind):
    """W' of every expert, row by row; the length of a row is a constant for the gradient."""
    W, A, B = getattr(stack, name), stack.lora_A[name]["default"], stack.lora_B[name]["default"]
    scale = KINDS[kind].get("lora_alpha", 3.0) / (R**0.5 if KINDS[kind].get("use_rslora") else R)
    matrices = []
    for e in range(E):
        rows = []
        for o in range(W.shape[1]):
            row = W[e, o] + scale * sum(B[e, o, r] * A[e, r] for r in range(R))
            if "DoRA" in kind:
                row = stack.lora_magnitude_vector[name]["default"][e, o] * row / row.detach().norm()
            rows.append(row)
        matrices.append(torch.stack(rows))
    return torch.stack(matrices)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path, N, idle", [("loop", 7, ()), ("grouped", 7, (0, 3)), ("auto", 1, ())])
def test_value_and_gradients_are_those_of_the_loop(kind, path, N, idle):
    model, names = experts(kind, path)
    freeze_all_but(model, names)
    x, indices, weights = inputs(N, idle)
    learned = [model.get_parameter(name) for name in names]
    assert len(names) == (6 if "DoRA" in kind else 4)
    y = model[0](x, indices, weights)
    matrices = [slow_weight(model[0], name, kind) for name in ("gate_up_proj", "down_proj")]
    expected = slow_experts(x, indices, weights, *matrices)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    mine = torch.autograd.grad(y, (x, weights, *learned), upstream)
    other = torch.autograd.grad(expected, (x, weights, *learned), upstream)
    for a, b in zip(mine, other, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    reached = set(indices.unique().tolist())
    for name, grad in zip(names, mine[2:], strict=True):
        assert {e for e in range(E) if grad[e].any()} == reached, name


def test_a_new_adapter_changes_nothing_and_every_expert_has_factors_of_its_own():
    model = torch.nn.Sequential(shake(Experts(E, C, F)))
    x, indices, weights = (t.float() if t.is_floating_point() else t for t in inputs(9))
    before = model[0](x, indices, weights)
    add_lora(model, LoraConfig(r=R, target_modules=["experts"]))
    assert torch.equal(model[0](x, indices, weights), before)
    A = model[0].lora_A
    shapes = [tuple(store[name]["default"].shape) for store in (A, model[0].lora_B) for name in A]
    assert shapes == [(E, R, C), (E, R, F), (E, 2 * F, R), (E, C, R)]
    for name, width in (("gate_up_proj", C), ("down_proj", F)):  # not of the stack: in is the last dimension
        drawn = A[name]["default"]
        assert 0.8 * width**-0.5 < drawn.abs().max() < width**-0.5
        assert len(drawn.unique()) == drawn.numel()


def test_under_autocast_the_sum_is_built_in_fp32():
    model, names = experts("DoRA")
    model.float()
    x, indices, weights = (t.float() if t.is_floating_point() else t for t in inputs(9))
    exact, matrix = model[0](x, indices, weights), model[0].effective("gate_up_proj", "default")
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x, indices, weights)
        assert torch.equal(model[0].effective("gate_up_proj", "default"), matrix)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.02 * exact.norm()


def test_on_a_base_in_bf16():
    """Factors stay in fp32, W' is rounded once."""
    model = torch.nn.Sequential(shake(Experts(E, C, F)).bfloat16())
    names = added(add_lora, model, LoraConfig(r=R, target_modules=["experts"]))
    shake_adapters(model)
    assert {model.get_parameter(name).dtype for name in names} == {torch.float32}
    x, indices, weights = inputs(9)
    y = model[0](x.bfloat16(), indices, weights.float())
    exact = model.double()[0](x, indices, weights)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.02 * exact.norm()
