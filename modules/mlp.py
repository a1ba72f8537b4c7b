"""SwiGLU feed-forward: one projection gates another.

    y = down( silu(gate(x)) * up(x) ),   silu(a) = a * sigmoid(a)

    x: (B, T, C)   gate, up: C -> F   down: F -> C   ->   (B, T, C)

Each of the three is a matrix, and with `bias` a vector that is added to its product (Llama's `mlp_bias`).

There are three matrices instead of the classic two, so F is usually about 8/3 C, which keeps the parameter
count of a classic feed-forward with 4 C channels.

Paper: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202. Names as in `Qwen3MLP`.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """`forward(x)`: (B, T, C) -> (B, T, C) through F hidden channels."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def lesson():
    """Print how much of a value of 1 the gate lets through, and its slope: silu is not a switch."""
    gate = torch.tensor([-6.0, -3.0, -1.278, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0], requires_grad=True)
    passed = F.silu(gate) * 1.0
    passed.sum().backward()
    print("SwiGLU: the gate's input, how much of up(x) = 1 passes, and the slope there")
    for g, p, slope in zip(gate.tolist(), passed.tolist(), gate.grad.tolist(), strict=True):
        print(f"  gate {g:6.2f}   passes {p:6.3f}   slope {slope:6.3f}  {'#' * max(0, round(8 * p))}")
    print("  the minimum is -0.278, at -1.278; ReLU would pass 0 there with slope 0")


if __name__ == "__main__":
    lesson()
