"""Mixture of experts (MoE): many small feed-forwards, of which each token uses a few.

    y = a * shared(x) + sum over the chosen experts i of  g_i * down_i( silu(gate_i(x)) * up_i(x) )

    x: (B, T, C)   gate_i, up_i: C -> F   down_i: F -> C   i = 1..E, K chosen   ->   (B, T, C)
    a: 1, or with `shared_expert_gate` sigmoid(x w^T), w: (1, C)

Parameters grow with E, the work per token with K only. In DeepSeekMoE (arXiv 2401.06066) experts are many and
narrow, so K of them can be combined in many ways. Shared experts see every token and learn what all tokens
need; n shared experts are one SwiGLU of n times the width, added to the routed ones. In Qwen2-MoE (arXiv
2407.10671) its width is free, and a gate of one row lets each token say how much of it to add. No token is
dropped when an expert is popular (as in MegaBlocks, arXiv 2211.15841).

Experts are stacked as in Hugging Face: `gate_up_proj` (E, 2F, C), gate first, and `down_proj` (E, C, F).
`loop_experts` is the textbook form, `modules/experts/grouped.py` the fast one; a test compares them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.experts.grouped import grouped_experts
from modules.experts.router import Routing, TopkRouter
from modules.mlp import SwiGLU


def loop_experts(x, indices, weights, gate_up, down):
    """Run one expert after the other: the reference.

    x (N, C), indices and weights (N, K), gate_up (E, 2F, C), down (E, C, F) -> (N, C).
    """
    # Under autocast the experts' outputs are bf16; they are weighted and added up in fp32, as weights are.
    y = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    out = x
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)  # (n,), (n,)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)  # (n, F) each
        out = F.linear(F.silu(gate) * up, down[expert])  # (n, C)
        y.index_add_(0, token, out * weights[token, slot, None])
    return y.to(out.dtype)


def run_experts(implementation: str, x, indices, weights, gate_up, down):
    """Run the experts by the path that `moe_implementation` names. `auto` takes the loop where sorting does
    not pay: with fewer rows than experts, as in generation. Shapes as in `loop_experts`."""
    if implementation == "auto":
        many = indices.numel() >= len(gate_up)
        implementation = "grouped" if many and x.device.type in ("cpu", "cuda") else "loop"
    path = grouped_experts if implementation == "grouped" else loop_experts
    return path(x, indices, weights, gate_up, down)


class Experts(nn.Module):
    """E feed-forwards of width F, initialized by the model that owns them."""

    def __init__(self, experts: int, hidden_size: int, width: int, implementation: str = "auto"):
        super().__init__()
        self.implementation = implementation
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x, indices, weights):
        """x (N, C), indices and weights (N, K) -> (N, C)."""
        return run_experts(self.implementation, x, indices, weights, self.gate_up_proj, self.down_proj)


def gated(shared, gate, x):
    """Return the output of the shared experts for x, as `gate` scales it (None: as it is). All (B, T, C)."""
    return shared if gate is None else gate(x).sigmoid() * shared


class MoE(nn.Module):
    """`forward(x)`: (B, T, C) -> (B, T, C) and the `Routing` of its N = B*T tokens."""

    def __init__(self, config):
        super().__init__()
        self.gate = TopkRouter(config)
        C, width = config.hidden_size, config.moe_intermediate_size
        self.experts = Experts(config.n_routed_experts, C, width, config.moe_implementation)
        self.shared_experts = SwiGLU(C, config.shared_width) if config.shared_width else None
        self.shared_expert_gate = nn.Linear(C, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x) -> tuple[torch.Tensor, Routing]:
        """(B, T, C) -> (B, T, C), Routing."""
        tokens = x.flatten(0, -2)  # (B, T, C) -> (N, C)
        routing = self.gate(tokens)
        y = self.experts(tokens, routing.indices, routing.weights).view(x.shape)
        if self.shared_experts is not None:
            y = y + gated(self.shared_experts(x), self.shared_expert_gate, x)
        return y, routing


def lesson():
    """Compare stored and used parameters, and print the loads of untrained experts."""
    from config.model import ModelConfig

    torch.manual_seed(0)
    config = ModelConfig(hidden_size=64, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=32)
    moe = MoE(config)
    total = sum(nn.init.normal_(p, std=0.1).numel() for p in moe.parameters())
    used = total - sum(p.numel() for p in moe.experts.parameters()) * 12 // 16
    print(f"MoE: {total:,} parameters, one token uses {used:,} ({used / total:.0%})")
    _, routing = moe(torch.randn(8, 128, 64))
    load = routing.indices.flatten().bincount(minlength=16) / (1024 * 4 / 16)
    print("load of the 16 experts, 1 = its fair share, random weights and tokens:")
    print("  ", " ".join(f"{share:.2f}" for share in load.tolist()))
    print(f"   the busiest has {load.max():.2f} times its share, the idlest {load.min():.2f}")


if __name__ == "__main__":
    lesson()
