"""Optimizers against `torch.optim`: Muon matrix by matrix, Adam and AdamW, and which parameter gets which."""

import re

import pytest
import torch
from torch import nn

from config.adapters import LoraConfig
from config.schema import OptimConfig, RunConfig
from config.seq2seq import Seq2SeqConfig
from model.adapters import attach
from model.encoder_decoder import EncoderDecoder
from model.tinyseek import TinySeek
from modules.muon import Muon, orthogonalize, through_gram
from tests.modules.tools import shake
from tests.modules.tools import small_config as model_config
from tests.train.tools import small_config, small_model
from train.engine.optimizers import build_optimizers, set_lr

SHAPES = [(16, 16), (8, 24), (24, 8), (16, 16), (1, 12), (40, 3), (8, 24)]  # square, wide, tall, equal ones
STACKS = [(3, 8, 20), (4, 20, 8), (2, 16, 16)]


def gradients(shapes, step):
    """One random gradient for each shape, the same ones for both sides, of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (n % 3 - 1) for n, shape in enumerate(shapes)]


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def dtype(request, monkeypatch):
    """Muon on a processor with and without bf16 units."""
    monkeypatch.setattr("modules.muon.multiplies_bf16", lambda kind: request.param)


@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.1), (0.95, 0.0), (0.95, 0.1)])
def test_muon_equals_that_of_torch_slice_by_slice(momentum, weight_decay, dtype):
    """Four steps with changing rates. Torch orthogonalizes in bf16, so even the exact result differs: bf16
    keeps 8 bits (1/256), an entry of an orthogonal matrix is at most 1, and 15 roundings add up."""
    shapes = SHAPES + STACKS
    start = gradients(shapes, 100)
    ours = [nn.Parameter(tensor.clone()) for tensor in start]
    slices = [
        [nn.Parameter(part.clone()) for part in tensor.reshape(-1, *tensor.shape[-2:])] for tensor in start
    ]
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": weight_decay}
    one = Muon(ours, **settings)
    other = torch.optim.Muon([part for parts in slices for part in parts], **settings)
    for step in range(4):
        for optimizer in (one, other):
            optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
        for parameter, parts, gradient in zip(ours, slices, gradients(shapes, step)):
            parameter.grad = gradient
            for part, piece in zip(parts, gradient.reshape(-1, *gradient.shape[-2:])):
                part.grad = piece.clone()
        one.step()
        other.step()
    moved = 0.05 * (1 + 1 / 2 + 1 / 3 + 1 / 4)
    for parameter, parts, first in zip(ours, slices, start):
        expected = torch.stack([part.detach() for part in parts]).reshape(parameter.shape)
        scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
        difference = (parameter.detach() - expected).norm() / (expected - first).norm()
        assert difference < 0.03, (tuple(parameter.shape), difference)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=0.03 * moved * scale)


@pytest.mark.parametrize("shape", [(3, 8, 6), (2, 24, 6), (1, 2, 4), (8, 6)])
def test_gate_and_up_in_one_parameter_are_matrices_of_their_own(shape, dtype):
    """`parts=2`: the upper and the lower half of each expert, as two parameters of torch's Muon, to a few
    hundredths of a step (bf16, see above)."""
    torch.manual_seed(2)
    stack = nn.Parameter(torch.randn(shape))
    halves = [nn.Parameter(half.clone()) for half in stack.detach().view(-1, shape[-2] // 2, shape[-1])]
    one = Muon([{"params": [stack], "parts": 2}], lr=0.05, weight_decay=0.1)
    other = torch.optim.Muon(halves, lr=0.05, momentum=0.95, weight_decay=0.1)
    for _ in range(3):
        stack.grad = torch.randn(shape)
        for half, gradient in zip(halves, stack.grad.view(-1, shape[-2] // 2, shape[-1]), strict=True):
            half.grad = gradient.clone()
        one.step()
        other.step()
    expected = torch.stack([half.detach() for half in halves]).view(shape)
    torch.testing.assert_close(stack.detach(), expected, rtol=0, atol=3 * 0.05 * 0.03)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("warm", [0, 1, 5])
def test_a_matrix_without_a_gradient_stays_where_it_is(warm, parts, dtype):
    """An expert without tokens, in its first step and with momentum of earlier ones; decay spares it, too."""
    torch.manual_seed(0)
    stack, alone = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(6, 2))
    optimizer = Muon([stack, alone], lr=0.1, weight_decay=0.1, parts=parts)
    for step in range(warm + 2):
        before = stack.detach().clone(), alone.detach().clone()
        stack.grad, alone.grad = torch.randn(3, 4, 6), torch.randn(6, 2)
        if step == warm:
            stack.grad[1], stack.grad[2, 2:], alone.grad[:] = 0, 0, 0
        optimizer.step()
        still = [torch.equal(a, b) for a, b in zip(stack, before[0], strict=True)]
        assert still == [False, step == warm, False] and torch.equal(alone, before[1]) == (step == warm)
        assert torch.equal(stack[2, 2:], before[0][2, 2:]) == (step == warm and parts == 2)


def test_processors_with_and_without_bf16_units_find_the_same_directions(monkeypatch):
    """Against Newton-Schulz in fp64: fp32 to rounding; bf16 to 15 products' worth of its 8 bits, which a
    contraction towards 1 does not add up (a few hundredths of the size)."""
    u = torch.randn(5, 8, 20, generator=torch.Generator().manual_seed(0))
    exact = u.double() / u.double().norm(dim=(1, 2), keepdim=True)
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's
    for _ in range(5):
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    for native, bound in ((True, 0.03), (False, 1e-5)):
        monkeypatch.setattr("modules.muon.multiplies_bf16", lambda kind, native=native: native)
        ours = orthogonalize(u)
        assert ours.dtype == (torch.bfloat16 if native else torch.float32)
        assert (ours - exact).norm() < bound * exact.norm()


def test_wide_matrices_go_through_their_gram_matrix():
    """The same polynomials in another order: equal in fp64, and in fp32 up to rounding, which a^5 = 485
    enlarges where singular values are tiny."""
    u = torch.randn(3, 6, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u[2, 1:] *= 1e-3  # one large direction
    x = exact = u / u.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = exact @ exact.mT
        exact = 3.4445 * exact + (-4.7750 * gram + 2.0315 * gram @ gram) @ exact
    assert (through_gram(x) - exact).norm() < 1e-12 * exact.norm()
    assert (through_gram(x.float()) - exact).norm() < 485 * 2.0**-24 * 6 * exact.norm()


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"\(5,\)"):
        Muon([nn.Parameter(torch.zeros(5))])


@pytest.mark.parametrize(("name", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_equal_those_of_torch(name, reference):
    """The textbook loops of torch (no fusing), with decay on the matrix alone, over five steps."""
    optim = OptimConfig(optimizer=name, lr=0.03, weight_decay=0.2, beta1=0.8, beta2=0.9)
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    matrix, bias = (nn.Parameter(p.detach().clone()) for p in (model.weight, model.bias))
    decay = 0.2 if name == "adamw" else 0.0
    groups = [{"params": [matrix], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}]
    expected = reference(groups, lr=0.03, betas=(0.8, 0.9), eps=1e-8, foreach=False, fused=False)
    (optimizer,) = build_optimizers(model, optim)
    for step in range(5):
        for parameter, copy, gradient in zip(
            (model.weight, model.bias), (matrix, bias), gradients([(4, 5), (4,)], step)
        ):
            parameter.grad, copy.grad = gradient, gradient.clone()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(model.weight, matrix, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.bias, bias, rtol=1e-6, atol=1e-7)


class WithExperts(nn.Module):
    """All kinds of parameters that the project has: tables, matrices, a stack of experts, gains, biases."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.proj = nn.Linear(4, 6)
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 6))
        self.mlp = nn.ModuleDict({"gate": nn.Linear(4, 3, bias=False)})  # a router
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_groups_cover_each_parameter_once(optimizer):
    """And decay is on matrices and tables only, never with plain Adam; Muon has the hidden matrices only."""
    model = WithExperts()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer, weight_decay=0.3))
    groups = [(made, group) for made in optimizers for group in made.param_groups]
    listed = [names[id(p)] for _, group in groups for p in group["params"]]
    trainable = {name for name in names.values() if not name.startswith("frozen")}
    assert len(listed) == len(set(listed)) and set(listed) == trainable
    decayed = {names[id(p)] for _, group in groups for p in group["params"] if group["weight_decay"] > 0}
    hidden = {"proj.weight", "experts", "gate_up_proj"}
    matrices = hidden | {"embed_tokens.weight", "mlp.gate.weight", "lm_head.weight"}
    assert decayed == (set() if optimizer == "adam" else matrices)
    by_muon = {names[id(p)] for made, group in groups if isinstance(made, Muon) for p in group["params"]}
    assert by_muon == (hidden if optimizer == "muon" else set())
    parts = {names[id(p)]: group.get("parts") for _, group in groups for p in group["params"]}
    if optimizer == "muon":
        assert {name: parts[name] for name in hidden} == {"proj.weight": 1, "experts": 1, "gate_up_proj": 2}


def test_tied_tables_are_one_parameter_and_stay_with_adamw():
    model = small_model(small_config())
    muon, adam = build_optimizers(model, OptimConfig(optimizer="muon"))
    tables = [p for group in adam.param_groups for p in group["params"] if p is model.lm_head.weight]
    assert len(tables) == 1 and tables[0] is model.model.embed_tokens.weight
    assert all(p.dim() == 2 for p in muon.param_groups[0]["params"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_t5_has_rates_of_its_own_for_distances_and_queries(optimizer):
    """Scores are not scaled. The table of distances is added to them, and decay would pull it to zero."""
    model = EncoderDecoder(Seq2SeqConfig(vocab_size=40, hidden_size=16, head_dim=16))
    optim = OptimConfig(optimizer=optimizer, weight_decay=0.1, lr=0.003, muon_lr=0.02)
    optimizers, found = build_optimizers(model, optim), {}
    for made in optimizers:
        plain = optim.muon_lr if isinstance(made, Muon) else optim.lr
        for group in made.param_groups:
            found |= {id(p): (group["lr"] / plain, group["weight_decay"]) for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate = {"relative_bias": 20, "q_proj": 0.25}.get(name.split(".")[-2], 1)
        decay = 0.1 if parameter.dim() == 2 and rate != 20 else 0.0
        assert found[id(parameter)] == pytest.approx((rate, decay)), name
    listed = [p for made in optimizers for group in made.param_groups for p in group["params"]]
    assert len(listed) == len(found) == len([*model.parameters()])


def test_parameters_of_adapters():
    """LoRA's factors are matrices, of experts as many; routers, prompts and DoRA's lengths are none."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "vocab_size": 50}
    config = RunConfig(model=model_config(**experts))
    config.lora = LoraConfig(target_modules=["attention", "experts"], use_dora=True)
    found = {}
    for kind, prefix in (
        ("Lora", "prefix"),
        ("MixLora", "prefix"),
        ("Prefix", "prefix"),
        ("Prefix", "prompt"),
    ):
        model, config.prefix.kind = shake(TinySeek(config.model)), prefix
        attach(model, kind, config)
        names = {id(p): name for name, p in model.named_parameters()}
        optim = OptimConfig(optimizer="muon", weight_decay=0.1)
        for made in build_optimizers(model, optim):
            for group in made.param_groups:
                how = (isinstance(made, Muon), group.get("parts", 1), group["weight_decay"] > 0)
                found |= {re.sub(r".*(layers\.\d+|model|prefix)\.", "", names[id(p)]): how
                          for p in group["params"]}  # fmt: skip
    expected = {
        "self_attn.q_proj.lora_A.default": (True, 1, True),
        "self_attn.q_proj.lora_B.default": (True, 1, True),
        "self_attn.q_proj.lora_magnitude_vector.default": (False, 1, False),
        "mlp.experts.lora_A.gate_up_proj.default": (True, 1, True),
        "mlp.experts.lora_B.gate_up_proj.default": (True, 2, True),
        "mlp.experts.lora_B.down_proj.default": (True, 1, True),
        "mlp.experts.lora_magnitude_vector.gate_up_proj.default": (False, 1, False),
        "mlp.shared_experts.gate.weight": (False, 1, True),
        "mlp.shared_experts.lora_experts.up_proj.lora_A": (True, 1, True),
        "keys": (False, 1, True),
        "embed_tokens.prompt": (False, 1, True),
    }
    assert {name: found.get(name) for name in expected} == expected


def test_set_lr_scales_every_group_from_its_own_start():
    optimizers = build_optimizers(WithExperts(), OptimConfig(optimizer="muon", lr=0.1, muon_lr=0.5))
    for factor in (0.5, 0.1):  # not one on top of the other
        set_lr(optimizers, factor)
        rates = [group["lr"] for made in optimizers for group in made.param_groups]
        assert rates == pytest.approx([0.5 * factor] * 2 + [0.1 * factor] * 2)
