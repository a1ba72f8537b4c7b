"""Mixture of experts (MoE): many small feed-forwards, of which each token uses a few.

    y = shared(x) + sum over the chosen experts i of  g_i * down_i( silu(gate_i(x)) * up_i(x) )

    x: (B, T, C)   gate_i, up_i: C -> F   down_i: F -> C   i = 1..E, K chosen   ->   (B, T, C)

Parameters grow with E, the work per token with K only. DeepSeekMoE (arXiv 2401.06066): experts are many and
narrow, so that K of them can be combined in many ways, and shared experts see every token and keep what all
tokens need; n shared experts are one SwiGLU of n times the width, and are summed with the routed ones. No
token is dropped when an expert is popular (as in MegaBlocks, arXiv 2211.15841).

Experts are stacked as in Hugging Face: `gate_up_proj` (E, 2F, C), gate first, and `down_proj` (E, C, F).
`loop_experts` is the textbook form, `modules/experts/grouped.py` the fast one; a test compares them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.experts.grouped import grouped_experts
from modules.mlp import SwiGLU
from modules.experts.router import Routing, TopkRouter


def loop_experts(x, indices, weights, gate_up, down):
    """The reference: one expert after the other.

    x (N, C), indices and weights (N, K), gate_up (E, 2F, C), down (E, C, F) -> (N, C).
    """
    # What experts give, in bf16 under autocast, is weighted and added up in the dtype of the weights: fp32.
    y = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    out = x
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)  # (n,), (n,)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)  # (n, F) each
        out = F.linear(F.silu(gate) * up, down[expert])  # (n, C)
        y.index_add_(0, token, out * weights[token, slot, None])
    return y.to(out.dtype)


class Experts(nn.Module):
    """E feed-forwards of width F. Initialised by the model that owns it."""

    def __init__(self, config):
        super().__init__()
        E, F_, C = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.implementation = config.moe_implementation
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, F_))

    def forward(self, x, indices, weights):
        """x (N, C), indices and weights (N, K) -> (N, C), by the path that `moe_implementation` names, or for
        `auto` by the loop where sorting does not pay: fewer rows than experts, as when generating."""
        name = self.implementation
        if name == "auto":
            many = indices.numel() >= len(self.gate_up_proj)
            name = "grouped" if many and x.device.type in ("cpu", "cuda") else "loop"
        path = grouped_experts if name == "grouped" else loop_experts
        return path(x, indices, weights, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """`forward(x)`: (B, T, C) -> (B, T, C) and the `Routing` of its N = B*T tokens.

    Args:
        config: reads hidden_size, moe_intermediate_size, n_shared_experts, moe_implementation and what
            `TopkRouter` reads.
    """

    def __init__(self, config):
        super().__init__()
        self.gate = TopkRouter(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, width) if width else None

    def forward(self, x) -> tuple[torch.Tensor, Routing]:
        """(B, T, C) -> (B, T, C), Routing."""
        tokens = x.flatten(0, -2)  # (B, T, C) -> (N, C)
        routing = self.gate(tokens)
        y = self.experts(tokens, routing.indices, routing.weights).view(x.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing


def lesson():
    """What is stored against what is used, that both paths agree, and how busy experts are at the start."""
    from config.model import ModelConfig

    torch.manual_seed(0)
    config = ModelConfig(hidden_size=64, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=32)
    moe = MoE(config)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.1)
    routed = sum(p.numel() for p in moe.experts.parameters())
    rest = sum(p.numel() for p in moe.parameters()) - routed
    used = rest + routed * 4 // 16
    print(f"MoE: {rest + routed:,} parameters, one token uses {used:,} ({used / (rest + routed):.0%})")
    x = torch.randn(8, 128, 64)
    y, routing = moe(x)
    experts = (routing.indices, routing.weights, moe.experts.gate_up_proj, moe.experts.down_proj)
    gap = loop_experts(x.flatten(0, 1), *experts) - grouped_experts(x.flatten(0, 1), *experts)
    print(f"textbook loop against tokens sorted by expert: largest difference {gap.abs().max():.0e}")
    load = routing.indices.flatten().bincount(minlength=16) / (1024 * 4 / 16)
    print("load of the 16 experts, 1 = its fair share, random weights and tokens:")
    print("  ", " ".join(f"{share:.2f}" for share in load.tolist()))
    print(f"   the busiest has {load.max():.2f} times its share, the idlest {load.min():.2f}")


if __name__ == "__main__":
    lesson()
