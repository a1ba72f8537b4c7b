"""What several tests of the building blocks need: configurations, random weights, and attention as an obvious
loop."""

import math

import torch

from config.checks import validate_section
from config.model import ModelConfig


def small_config(**changes) -> ModelConfig:
    """A checked configuration of a tiny model; head_dim is not hidden_size / heads, on purpose."""
    values = {
        "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": 64,
    }  # fmt: skip
    config = ModelConfig(**(values | changes))
    validate_section("model", config)
    return config


def added(add, model, *settings):
    """The names of the parameters that `add(model, *settings)` adds."""
    before = {name for name, _ in model.named_parameters()}
    add(model, *settings)
    return [name for name, _ in model.named_parameters() if name not in before]


@torch.no_grad()
def shake(module, seed=0, scale=0.3):
    """Random weights, gains and biases: ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.copy_(1 + scale * noise if "norm" in name else scale * noise)
    return module


def slow_attention(q, k, v, allowed, scale):
    """Softmax attention per row, head and query; `allowed(b, query, key)` says who may look. Any dtype with
    gradients."""
    B, H, T, _ = q.shape
    G, S = k.shape[1], k.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                seen = [s for s in range(S) if allowed(b, t, s)]
                if not seen:
                    rows.append(torch.zeros(v.shape[-1], dtype=v.dtype))
                    continue
                scores = torch.stack([(q[b, h, t] * k[b, g, s]).sum() * scale for s in seen])
                weights = torch.exp(scores - scores.max().detach())
                weights = weights / weights.sum()
                rows.append(sum(weight * v[b, g, s] for weight, s in zip(weights, seen, strict=True)))
    return torch.stack(rows).view(B, H, T, -1)


def slow_rotation(x, positions, inv_freq, interleaved=False, factor=1.0):
    """RoPE with complex numbers, one pair of channels at a time. x (B, H, T, D), positions (B, T), fp64."""
    out = torch.zeros_like(x)
    half = x.shape[-1] // 2
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            for i in range(half):
                first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                angle = float(positions[b, t]) * float(inv_freq[i])
                turn = factor * complex(math.cos(angle), math.sin(angle))
                for h in range(x.shape[1]):
                    z = complex(x[b, h, t, first], x[b, h, t, second]) * turn
                    out[b, h, t, first], out[b, h, t, second] = z.real, z.imag
    return out
