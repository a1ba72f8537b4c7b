"""The comparison of adapters: bytes counted by hand, on shapes so small that times mean nothing."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config.load import load_config
from tests.train.tools import machine
from train.lab import benchmark_adapters
from train.lab.benchmark_adapters import Contender

SMALL = {
    "model.vocab_size": 64, "model.hidden_size": 32, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.intermediate_size": 48,
    "model.max_position_embeddings": 32, "data.sequence_length": 16, "train.batch_size": 2,
    "train.dtype": "fp32", "train.device": "cpu", "optim.optimizer": "muon", "lora.r": 4, "prefix.length": 4,
}  # fmt: skip
EXPERTS = {"model.n_routed_experts": 4, "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 8}


def settings(**changes) -> list[str]:
    return [f"{key}={value}" for key, value in (SMALL | changes).items()]


def contender(name, rows=2, **changes) -> Contender:
    config = load_config("tiny", settings(**changes))
    torch.manual_seed(0)
    ids = torch.randint(64, (rows, 17))
    return Contender(config, *benchmark_adapters.kinds(config)[name], ids, machine())


def test_full_training_holds_four_numbers_for_each_weight():
    """The weight, its gradient, two moments; and each tensor has a step counter in fp32."""
    one = contender("full")
    tensors, found = list(one.model.parameters()), one.measure()
    numbers = sum(part.numel() for part in tensors)
    assert found["numbers"] == found["trained"] == numbers
    assert found["weights"] == found["gradients"] == found["checkpoint"] == 4 * numbers
    assert found["optimizer"] == 8 * numbers + 4 * len(tensors)
    assert found["fixed"] >= 4 * 64 * 32  # the output head's gradient


def test_lora_holds_gradients_and_moments_of_its_factors_only():
    """Per layer: q and o 32 -> 32, k and v 32 -> 16, rank 4; the factors are two per matrix."""
    one, full = contender("LoRA, attention"), contender("full").measure()
    found, factors = one.measure(), 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16))
    assert found["trained"] == factors
    assert found["gradients"] == found["checkpoint"] == 4 * factors
    assert found["optimizer"] == 8 * factors + 4 * 2 * 2 * 4
    assert found["weights"] == full["weights"] + 4 * factors
    assert found["fixed"] < full["fixed"] and found["activations"] < full["activations"]


@pytest.mark.parametrize("name", ["full", "LoRA, attention+dense+shared", "MixLoRA", "prefix"])
def test_activations_grow_with_the_rows_and_the_rest_does_not(name):
    fixed, activations = contender(name, rows=2).saved()
    assert contender(name, rows=6).saved() == (fixed, pytest.approx(3 * activations, abs=24))  # 24: a few ids


class TwoProducts(nn.Module):
    """sum of (U W e)^2: the backward pass needs e and W e for the weights, U for W, and the last output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 16).requires_grad_(False)
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, ids, labels):
        out = self.second(self.first(self.table(ids)))
        return SimpleNamespace(loss_sum=(out * out).sum())


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(("dtype", "number"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_what_is_saved_is_counted_once(second, dtype, number):
    """`out` is saved twice; a weight's copy in bf16 does not grow, and a weight in fp32 is no copy at all."""
    model, ids = TwoProducts(), torch.zeros(2, 5, dtype=torch.long)
    model.second.requires_grad_(second)  # a frozen matrix needs no input, but passes gradients on
    one = Contender.__new__(Contender)
    one.model, one.inputs, one.labels, one.machine = model, ids, ids, machine(dtype=dtype)
    copy = 2 * 16 * 16 if dtype == torch.bfloat16 else 0
    assert one.saved() == (copy, number * (3 if second else 2) * 10 * 16)


@pytest.mark.parametrize("name", ["full", "LoRA, experts too", "MixLoRA"])
def test_a_step_moves_what_learns_and_nothing_else(name):
    one = contender(name, **EXPERTS)
    before = {key: part.detach().clone() for key, part in one.model.named_parameters()}
    one.step()
    one.step()  # the factors A move only after B has
    for key, part in one.model.named_parameters():
        assert torch.equal(part, before[key]) != (one.own is None or key in one.own), key
        assert part.grad is None
    assert any("experts.lora_A" in key for key in one.own or ()) == (name == "LoRA, experts too")


@pytest.mark.parametrize(
    ("preset", "changes", "names"),
    [
        ("tiny", {}, ["full", "LoRA, attention", "LoRA, attention+dense+shared", "MixLoRA", "prefix"]),
        ("laptop", EXPERTS | {"model.attention_kind": "mla", "model.n_shared_experts": 0},
         ["full", "LoRA, attention", "LoRA, attention+dense+shared", "LoRA, experts too"]),
    ],
)  # fmt: skip
def test_the_command_prints_a_table_with_ratios(capsys, monkeypatch, preset, changes, names):
    sets = [part for setting in settings(**changes) for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["benchmark_adapters.py", "--config", preset, "--steps", "1", *sets])
    threads = torch.get_num_threads()
    try:
        benchmark_adapters.main()
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == names and set(rule) == {"---"} and len({*map(len, lines)}) == 1
    assert rows[0][9] == rows[0][11] == "1.00" and rows[0][2] == "100.0%" and head[9] == head[11] == "ratio"


def test_ratios_and_medians_are_those_of_the_measurement():
    one = dict(numbers=100, trained=100, weights=4e6, gradients=4e6, optimizer=8e6)
    one |= dict(fixed=1e6, activations=3e6, checkpoint=4e6)
    two = one | dict(trained=5, gradients=0.0, optimizer=0.0, fixed=0.0, activations=1e6, checkpoint=2e4)
    lines = benchmark_adapters.table({"a": one, "b": two}, {"a": [1.0, 2.0, 9.0], "b": [0.5, 0.5, 7.0]})
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert first[3:] == ["4.0", "4.0", "8.0", "1.0", "3.0", "20.0", "1.00", "2000", "1.00", "4.00"]
    assert second[:3] == ["b", "5", "5.0%"]
    assert second[3:] == ["4.0", "0.0", "0.0", "0.0", "1.0", "5.0", "0.25", "500", "0.50", "0.02"]
