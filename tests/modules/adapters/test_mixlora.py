"""MixLoRA against an obvious loop in fp64 and, where experts are alike or single, against `peft`'s LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from config.adapters import MixLoraConfig
from config.schema import BalanceConfig
from inference.fast.decoder import refusal
from model.tinyseek import TinySeek
from train.engine.load_balancer import LoadBalancer
from modules.adapters.mixlora import PROJECTIONS, LoraStack, MixLoraMLP, MixLoraMoE, add_mixlora
from modules.mlp import SwiGLU
from tests.modules.tools import added, shake, small_config
from utils.errors import UserError

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 5}
BOTH = MOE | {"first_k_dense_replace": 1}  # one dense layer, one with experts
SHAPES = {  # E, K, R, C, F, B, T, shared adapter
    "plain": (5, 2, 3, 6, 10, 2, 4, False),
    "shared": (4, 3, 2, 5, 7, 3, 3, True),
    "one token": (8, 2, 4, 6, 5, 1, 1, True),
    "every expert, rank one": (3, 3, 1, 4, 6, 1, 5, False),
    "one expert": (1, 1, 2, 4, 6, 2, 3, True),
    "one channel": (4, 2, 2, 1, 1, 1, 7, False),
}


def mixture(E=5, K=2, R=3, C=6, width=10, shared=False, dtype=torch.float64, dropout=0.0, seed=0):
    """A mixture with random weights over a frozen base, as training has it."""
    base = SwiGLU(C, width)
    settings = MixLoraConfig(E, K, R, lora_alpha=5.0, lora_dropout=dropout, shared_expert=shared)
    ours = shake(MixLoraMLP(base, settings), seed, scale=0.5).to(dtype)
    base.requires_grad_(False)
    return ours


def slow(ours, x):
    """One token, one expert after the other, with whole weights. x (B, T, C) -> (B, T, C)."""
    weights = {}
    E, R = ours.lora_experts["up_proj"].lora_A.shape[:2]
    for name in PROJECTIONS:
        base, experts = getattr(ours, name).weight, ours.lora_experts[name]
        if ours.lora_shared is not None:
            base = base + 5.0 / R * ours.lora_shared[name].lora_B[0] @ ours.lora_shared[name].lora_A[0]
        weights[name] = [base + 5.0 / R * experts.lora_B[e] @ experts.lora_A[e] for e in range(E)]
    rows = []
    for token in x.flatten(0, 1):
        scores = torch.exp(ours.gate.weight @ token)
        probs = scores / scores.sum()
        chosen = sorted(range(E), key=lambda e: -probs[e].item())[: ours.gate.config.num_experts_per_tok]
        total, row = sum(probs[e] for e in chosen), 0
        for e in chosen:
            gate, up = weights["gate_proj"][e] @ token, weights["up_proj"][e] @ token
            inner = gate / (1 + torch.exp(-gate)) * up
            row = row + probs[e] / total * (weights["down_proj"][e] @ inner)
        rows.append(row)
    return torch.stack(rows).view(x.shape)


def with_gradients(forward, ours, x, upstream):
    """Value, and by name the gradients of x and of all that learns."""
    x = x.clone().requires_grad_()
    learns = {name: weight for name, weight in ours.named_parameters() if weight.requires_grad}
    y = forward(x)
    grads = torch.autograd.grad(y, (x, *learns.values()), upstream.to(y.dtype), allow_unused=True)
    return y, dict(zip(("x", *learns), grads, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_every_gradient_are_those_of_the_loop_over_tokens(shape):
    E, K, R, C, width, B, T, shared = shape
    ours = mixture(E, K, R, C, width, shared)
    x, upstream = torch.randn(2, B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, grads = with_gradients(lambda x: ours(x)[0], ours, x, upstream)
    expected, slow_grads = with_gradients(lambda x: slow(ours, x), ours, x, upstream)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert len(grads) == 2 + 6 * (1 + shared)
    for name, grad in grads.items():
        assert (E == 1 and name == "gate.weight") or slow_grads[name].abs().max() > 1e-3, name
        torch.testing.assert_close(
            grad, slow_grads[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_an_expert_that_gets_nothing_gets_a_gradient_of_zeros():
    ours = mixture(E=5)
    x = torch.rand(2, 3, 6, dtype=torch.float64)
    ours.gate.weight.data[[1, 4]] = -100
    y, routing = ours(x)
    y.sum().backward()
    assert not {1, 4} & set(routing.indices.flatten().tolist())
    for adapter in ours.lora_experts.values():
        for weight in adapter.parameters():
            idle = [not weight.grad[e].any() for e in range(5)]
            assert idle[1] and idle[4] and sum(idle) < 5


def peft_mlp(ours, expert=0, r=3):
    """Hugging Face's feed-forward with the same base, and `peft`'s LoRA with the matrices of one expert."""
    E, C = ours.gate.weight.shape
    theirs = Qwen3MLP(Qwen3Config(hidden_size=C, intermediate_size=ours.up_proj.out_features))
    theirs.load_state_dict({f"{name}.weight": getattr(ours, name).weight for name in PROJECTIONS})
    settings = PeftConfig(r=r, lora_alpha=5.0, target_modules=list(PROJECTIONS))
    theirs = get_peft_model(nn.ModuleDict({"mlp": theirs}), settings)
    for name in PROJECTIONS:
        layer = getattr(theirs.base_model.model["mlp"], name)
        layer.lora_A["default"].weight.data = ours.lora_experts[name].lora_A[expert].data.clone()
        layer.lora_B["default"].weight.data = ours.lora_experts[name].lora_B[expert].data.clone()
    return theirs.base_model.model["mlp"]


@pytest.mark.parametrize("E, K", [(6, 3), (1, 1)])
def test_equal_experts_or_a_single_one_are_pefts_lora(E, K):
    """With any router; and equal experts share out what one gets: their gradients add up to its gradient."""
    ours = mixture(E, K, dtype=torch.float32)
    for adapter in ours.lora_experts.values():
        for weight in adapter.parameters():
            weight.data[:] = weight.data[0].clone()
    theirs, x = peft_mlp(ours), torch.randn(3, 7, 6)
    y, routing = ours(x)
    expected = theirs(x)
    if E > 1:
        assert len(set(map(tuple, routing.indices.tolist()))) > 3 and routing.weights.std() > 0.05
    else:
        assert torch.equal(routing.weights, torch.ones(21, 1))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    for name in PROJECTIONS:
        for matrix in ("lora_A", "lora_B"):
            grad = getattr(ours.lora_experts[name], matrix).grad.sum(0)
            twin = getattr(getattr(theirs, name), matrix)["default"].weight.grad
            assert twin.abs().max() > 1e-2
            torch.testing.assert_close(grad, twin, rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_base_and_as_lora_starts():
    """B is zero; A of each expert is of the size of `peft`'s, and no two are alike."""
    torch.manual_seed(0)
    linear = nn.Linear(50, 20, bias=False)
    adapter = LoraStack(linear, 40, MixLoraConfig(r=4))
    bound = 50**-0.5
    assert not adapter.lora_B.any() and adapter.lora_B.shape == (40, 20, 4)
    assert 0.98 * bound < adapter.lora_A.abs().max() <= bound
    assert (
        abs(adapter.lora_A.std() / bound - 3**-0.5) < 0.02 and len(adapter.lora_A.flatten().unique()) > 7000
    )
    base, x = shake(SwiGLU(6, 8)), torch.randn(2, 5, 6)
    ours = MixLoraMLP(base, MixLoraConfig(shared_expert=True))
    torch.testing.assert_close(ours(x)[0], base(x), rtol=1e-6, atol=1e-6)
    biased = shake(SwiGLU(6, 8, bias=True))
    torch.testing.assert_close(MixLoraMLP(biased, MixLoraConfig())(x)[0], biased(x), rtol=1e-6, atol=1e-6)
    assert 0.01 < ours.gate.weight.std() < 0.03


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_is_of_the_adapters_input_and_in_training_only(shared):
    """With everything dropped (almost surely) the base is left; what is kept is scaled up."""
    ours = mixture(E=3, shared=shared, dropout=0.999999, dtype=torch.float32)
    base, x = SwiGLU(6, 10), torch.randn(2, 4, 6)
    for name in PROJECTIONS:
        getattr(base, name).weight = getattr(ours, name).weight
    torch.testing.assert_close(ours(x)[0], base(x), rtol=1e-5, atol=1e-5)
    ours.eval()
    assert (ours(x)[0] - base(x)).abs().max() > 0.1
    adapter = mixture(dropout=0.5, dtype=torch.float32).lora_experts["up_proj"]
    with torch.no_grad():
        mean = torch.stack([adapter.shrink(x[0]) for _ in range(3000)]).mean(0)
        torch.testing.assert_close(mean, adapter.eval().shrink(x[0]), rtol=0, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_near_the_exact_answer(dtype):
    """Under autocast and in a model in bf16: rounding each of some ten values to 8 bits stays below 3 %."""
    exact = mixture(shared=True)
    ours = copy.deepcopy(exact).to(dtype)
    x = torch.randn(4, 9, 6, dtype=torch.float64).to(dtype)
    expected, _ = copy.deepcopy(ours).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y, routing = ours(x)
    assert y.dtype == torch.bfloat16 and routing.weights.dtype == torch.float32
    assert (y - expected).norm() < 0.03 * expected.norm()
    y.sum().backward()
    assert all((w.grad is not None and w.grad.dtype == dtype) == w.requires_grad for w in ours.parameters())


def test_factors_and_router_stay_in_fp32_on_a_base_in_bf16():
    """As in LoRA: an optimizer's small steps would be rounded away in 8 bits."""
    base = shake(SwiGLU(6, 10)).bfloat16().requires_grad_(False)
    ours = shake(MixLoraMLP(base, MixLoraConfig(4, 2, 3, shared_expert=True)), scale=0.5)
    kinds = {name: weight.dtype for name, weight in ours.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.endswith("_proj.weight")} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if not name.endswith("_proj.weight")} == {torch.float32}
    x = torch.randn(4, 9, 6).bfloat16()
    y, routing = ours(x)
    exact, _ = copy.deepcopy(ours).double()(x.double())
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.03 * exact.norm()
    y.sum().backward()
    step = 1e-3 * ours.gate.weight.detach()  # bf16 would keep none of it
    with torch.no_grad():
        moved = copy.deepcopy(ours)
        moved.gate.weight += step
    assert torch.equal(routing.logits, ours(x)[1].logits)
    assert (moved.gate.weight != ours.gate.weight).all()


def test_a_frozen_router_does_not_jitter():
    """Noise is for exploring; here it would only shake what the adapter is trained on."""
    model, _ = model_of(router_jitter_noise=0.5, **MOE)
    layer, x = model.train().model.layers[0].mlp, torch.randn(2, 5, 24)
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.gate.requires_grad_(True)
    assert not torch.equal(layer(x)[0], layer(x)[0])


def model_of(config=None, seed=0, **changes):
    """A random model, frozen but for its mixture, whose matrices are random too; and the mixture's names."""
    model = shake(TinySeek(small_config(**changes)), seed)
    model.requires_grad_(False)
    names = added(add_mixlora, model, config or MixLoraConfig(4, 2, 3))
    return shake(model, seed), names


def ids(B=2, T=5, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, MOE, BOTH], ids=["dense", "MoE", "both"])
def test_in_a_model_exactly_routers_and_adapters_learn(changes):
    """What was there stays, by name and by object; one routing per layer, all of the mixture's experts."""
    model = shake(TinySeek(small_config(**changes)))
    model.requires_grad_(False)
    before, plain = dict(model.named_parameters()), model(ids()).logits
    shapes = set(model.state_dict())
    names = added(add_mixlora, model.eval(), MixLoraConfig(4, 2, 3, shared_expert=True))
    after = dict(model.named_parameters())
    assert set(after) - set(before) == set(names) and not any(module.training for module in model.modules())
    assert all(after[name] is before[name] for name in before) and shapes <= set(model.state_dict())
    assert {name for name, weight in after.items() if weight.requires_grad} == set(names)
    assert all(name.endswith(("gate.weight", "lora_A", "lora_B")) for name in names)
    assert len(names) == 2 * (1 + 6 + 6)
    torch.testing.assert_close(model(ids()).logits, plain, rtol=1e-5, atol=1e-6)  # B is zero
    shake(model)
    out = model(ids(3, 5), labels=ids(3, 5, seed=1))
    out.loss_sum.backward()
    assert all(after[name].grad.abs().max() > 0 for name in names)
    assert [(r.logits.shape, r.indices.shape) for r in out.routings] == [((15, 4), (15, 2))] * 2
    assert refusal(model)


@pytest.mark.parametrize("gate", [False, True])
def test_in_a_layer_with_experts_the_routed_ones_stay_as_they_are(gate):
    """Against the base's block with the shared experts' part exchanged for the mixture's."""
    changes = MOE | {"shared_expert_gate": gate}
    plain = shake(TinySeek(small_config(**changes))).model.layers[0].mlp
    model, _ = model_of(**changes)
    ours, x = model.model.layers[0].mlp, torch.randn(2, 5, 24)
    assert isinstance(ours, MixLoraMoE)
    theirs = ours.state_dict()
    plain.load_state_dict({name: theirs[name] for name in plain.state_dict()})
    y, routing = ours(x)
    mixed, expected = ours.shared_experts(x)
    factor = torch.sigmoid(x @ plain.shared_expert_gate.weight[0])[..., None] if gate else 1.0
    exchanged = plain(x)[0] + factor * (mixed - plain.shared_experts(x))
    torch.testing.assert_close(y, exchanged, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(routing, expected, strict=True))


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "MoE"])
def test_copies_casts_and_files(changes):
    settings = MixLoraConfig(4, 2, 3, shared_expert=True)
    model, _ = model_of(settings, **changes)
    logits = model(ids()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids()).logits, logits)
    twin.model.layers[0].mlp.requires_grad_(False).apply(lambda module: shake(module, 5))
    assert torch.equal(model(ids()).logits, logits) and not torch.equal(twin(ids()).logits, logits)
    other, _ = model_of(settings, seed=9, **changes)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(ids()).logits, logits)
    half = other.to(torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert half(ids()).logits.dtype == torch.bfloat16
    late = TinySeek(small_config(**changes)).double()  # a mixture added to a model in fp64 is in fp64
    add_mixlora(late, settings)
    assert {weight.dtype for weight in late.parameters()} == {torch.float64}


def test_balance_works_with_these_routings():
    """The loss reaches every router and no adapter's matrix in the layer itself; counts are those of real
    tokens."""
    model, _ = model_of()
    routers = [layer.mlp.gate for layer in model.model.layers]
    balancer = LoadBalancer(BalanceConfig(weight=1.0, scope="batch"), routers)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    balancer.begin_step(7)
    out = model(ids(), padding_mask=mask)
    terms, _ = balancer.loss(out.routings, mask)
    terms["balance"].backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers)
    real = out.routings[0].indices.view(2, 5, 2)[mask.bool()]
    counts = real.flatten().bincount(minlength=4)
    balancer.end_step()
    torch.testing.assert_close(balancer.loads[0], (counts / 14).double())


def test_what_it_cannot_adapt_it_says():
    model = TinySeek(small_config(**BOTH | {"n_shared_experts": 0}))
    before = set(model.state_dict())
    with pytest.raises(UserError, match="layer 1 has none.*n_shared_experts=0"):
        add_mixlora(model, MixLoraConfig())
    assert set(model.state_dict()) == before and not model.model.layers[0].has_experts  # nothing was touched


@pytest.mark.parametrize("mtp", ["parallel", "sequential"])
def test_the_second_head_stays_as_it_is(mtp):
    model, names = model_of(mtp=mtp, **MOE)
    assert not any(name.startswith("mtp") for name in names)
    assert model(ids(), labels=ids(), mtp=True).mtp_loss_sum.isfinite()
