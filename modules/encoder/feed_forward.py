"""Feed-forward of an encoder: GELU between two matrices, or with a gate beside the first.

    plain   y = down( act(up(x)) )                  BERT: act = gelu, with biases
    gated   y = down( act(gate(x)) * up(x) )        ModernBERT, T5: gelu (GeGLU); with silu it is SwiGLU

    gelu(a) = a * P(Z <= a) = a/2 * (1 + erf(a / sqrt(2))),   Z from a standard normal distribution

    x: (B, T, C)   up, gate: C -> F   down: F -> C   ->   (B, T, C)

GELU multiplies an input by the probability P, which rises smoothly from 0 to 1; ReLU switches at zero. A gate
costs a third matrix, so F is smaller with it: 4 C in BERT, 1.5 C in ModernBERT.

Papers: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415; Shazeer, arXiv 2002.05202.
Trap: GPT-2 and T5 approximate erf by tanh (`gelu_new`). The two differ by up to 5e-4, too little to break a
model and enough to fail a comparison. In training, T5 also drops some of the F channels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "silu": F.silu}


class FeedForward(nn.Module):
    """`forward(x)`: (B, T, C) -> (B, T, C) through F hidden channels."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, act: str, gated: bool, bias: bool, dropout=0.0
    ):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act, self.dropout = ACTIVATIONS[act], nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        if self.gate_proj is None:
            return self.down_proj(self.dropout(self.act(self.up_proj(x))))
        return self.down_proj(self.dropout(self.act(self.gate_proj(x)) * self.up_proj(x)))


def lesson():
    """Print GELU beside ReLU, SiLU and the tanh form, and the matrices of both feed-forwards."""
    print("      a     relu     silu     gelu   by tanh - by erf")
    for a in (-4.0, -2.0, -0.75, -0.1, 0.0, 0.5, 1.0, 2.0, 4.0):
        x = torch.tensor(a, dtype=torch.float64)
        exact, rough = F.gelu(x), F.gelu(x, approximate="tanh")
        print(f"  {a:5.2f} {x.relu():8.3f} {F.silu(x):8.3f} {exact:8.3f}   {rough - exact:10.1e}")
    line = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    gap = (F.gelu(line, approximate="tanh") - F.gelu(line)).abs()
    print(f"  the tanh form is off by {gap.max():.1e} at most, at {line[gap.argmax()].abs():.2f} from zero")
    for name, width, gated in (("BERT", 3072, False), ("ModernBERT", 1152, True)):
        block = FeedForward(768, width, "gelu", gated, bias=False)
        matrices = len(list(block.parameters()))
        print(f"  {name}: {matrices} matrices of 768 x {width}, "
              f"{sum(p.numel() for p in block.parameters()):,} numbers")  # fmt: skip


if __name__ == "__main__":
    lesson()
