"""SwiGLU feed-forward: one projection decides how much of another passes.

    y = down( silu(gate(x)) * up(x) ),   silu(a) = a * sigmoid(a)

    x: (B, T, C)   gate, up: C -> F   down: F -> C   ->   (B, T, C)

Three matrices instead of the classic two, so F is usually chosen near 8/3 C to keep the parameters of a 4 C
feed-forward.

Paper: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202. Names as in `Qwen3MLP`.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """`forward(x)`: (B, T, C) -> (B, T, C) through F hidden channels, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def lesson():
    """What the gate does to a value of 1, and its slope: silu is no switch."""
    gate = torch.tensor([-6.0, -3.0, -1.278, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0], requires_grad=True)
    passed = F.silu(gate) * 1.0
    passed.sum().backward()
    print("SwiGLU: the gate's input, how much of up(x) = 1 passes, and the slope there")
    for g, p, slope in zip(gate.tolist(), passed.tolist(), gate.grad.tolist(), strict=True):
        bar = "#" * max(0, round(8 * p))
        print(f"  gate {g:6.2f}   passes {p:6.3f}   slope {slope:6.3f}  {bar}")
    print("  the least it passes is -0.278, at -1.278; ReLU would pass 0 there with slope 0")
    mlp = SwiGLU(256, 704)
    count = sum(p.numel() for p in mlp.parameters())
    print(f"  parameters: 3 x 256 x 704 = {count:,}; a classic 4 C feed-forward has {2 * 256 * 1024:,}")


if __name__ == "__main__":
    lesson()
