"""The gate's classifier and its score, against obvious loops."""

import math

import pytest
import torch

from modules.adapters.selector import Selector, choices
from tests.modules.tools import shake


@pytest.mark.parametrize("width, shape", [(0, (5,)), (3, (1, 1, 5)), (7, (2, 3, 5)), (1, (4, 5))])
def test_the_gate_is_the_formula(width, shape):
    """W2 silu(W1 norm(h) + b1) + b2, one number after the other."""
    gate = shake(Selector(5, 3, width), 2, scale=0.7).double()
    h = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = gate(h)
    assert got.shape == (*shape[:-1], 3)
    for row, logits in zip(h.reshape(-1, 5).tolist(), got.reshape(-1, 3).tolist(), strict=True):
        size = math.sqrt(sum(x * x for x in row) / 5 + 1e-6)
        x = [value / size * gain for value, gain in zip(row, gate.norm.weight.tolist(), strict=True)]
        layers = [gate.up_proj, gate.out_proj] if width else [gate.out_proj]
        for layer in layers:
            pairs = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            x = [sum(w * v for w, v in zip(line, x, strict=True)) + bias for line, bias in pairs]
            if layer is gate.up_proj:
                x = [value / (1 + math.exp(-value)) for value in x]
        assert logits == pytest.approx(x, abs=1e-9)


@pytest.mark.parametrize("N, A", [(1, 1), (1, 4), (9, 2), (40, 3)])
def test_choices_are_counted_one_by_one(N, A):
    generator = torch.Generator().manual_seed(N + A)
    losses = torch.randint(1, 4, (N, A), generator=generator) / 30  # close together, with ties
    logits = torch.randn(N, A, generator=generator)
    right, got, best, alone = 0, [], [], [0.0] * A
    for row, scores in zip(losses.tolist(), logits.tolist(), strict=True):
        chosen = row[scores.index(max(scores))]
        right += chosen == min(row)
        got.append(chosen)
        best.append(min(row))
        alone = [total + loss for total, loss in zip(alone, row, strict=True)]
    found = choices(losses, logits)
    assert found["accuracy"] == pytest.approx(right / N)
    assert found["selector"] == pytest.approx(sum(got) / N) and found["best"] == pytest.approx(sum(best) / N)
    assert found["regret"] == pytest.approx((sum(got) - sum(best)) / N, abs=1e-6)
    assert found["alone"] == pytest.approx([total / N for total in alone])


def test_extremes_of_choosing():
    """Always right: no regret. Always wrong: all of it. A tie is right whoever is chosen."""
    losses = torch.tensor([[1.0, 3.0], [4.0, 2.0]])
    assert choices(losses, -losses) == {
        "accuracy": 1.0, "regret": 0.0, "selector": 1.5, "best": 1.5, "alone": [2.5, 2.5]
    }  # fmt: skip
    assert choices(losses, losses)["regret"] == 2.0 and choices(losses, losses)["accuracy"] == 0.0
    assert choices(torch.ones(3, 2), torch.randn(3, 2))["accuracy"] == 1.0
