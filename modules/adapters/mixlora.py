"""MixLoRA: turn a frozen feed-forward into a mixture of experts, each of them a LoRA adapter of it.

    h_k = silu((Wg + s Bg_k Ag_k) x) * ((Wu + s Bu_k Au_k) x)             expert k = 1..E, s = alpha / R
    y = sum over the K chosen experts of  g_k * (Wd + s Bd_k Ad_k) h_k    g: softmax over E, normed over K

    x: (B, T, C)   Wg, Wu: C -> F   Wd: F -> C, frozen   A_k: in -> R   B_k: R -> out   ->   (B, T, C)

The experts share the large products. Wg x and Wu x do not depend on the expert and are computed once, and so
is the product with Wd, as sum g_k Wd h_k = Wd (sum g_k h_k). A bias that the base has on Wd is added once, as
the g_k sum to 1.

Since ranks are small, tokens need not be sorted. The A of all experts are one matrix (E*R, in), whose product
holds the ranks of each expert side by side; a mask of zeros and ones keeps those of the chosen expert; the B
of all experts are one matrix (out, E*R). The price is E times the work of one adapter, in large plain
products; against the frozen feed-forward E*R is small. Forward and backward with C = 256, F = 768, E = 8,
R = 8 cost 2.1 times the frozen SwiGLU in fp32, 2.6 in bf16 (one thread of an AMD EPYC with bf16 units).

A dense layer gets the mixture in place of its SwiGLU. A layer with experts gets it in place of its shared
experts, which every token uses; routed experts and their router stay frozen. B starts at zero, so the model
starts unchanged. An optional shared adapter, which every token uses, is added to the three W.

Paper: Li et al., "MixLoRA", arXiv 2404.15159; balance of its experts: train/engine/load_balancer.py.
Trap: factors and router are fp32 even on a base in bf16, which would round small steps away.
"""

import torch
import torch.nn.functional as F
from torch import nn

from config.adapters import MixLoraConfig
from config.model import ModelConfig
from modules.adapters.lora import wide
from modules.experts.moe import MoE, gated
from modules.experts.router import Routing, TopkRouter
from modules.mlp import SwiGLU
from utils.errors import UserError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def cast_like(x, weight):
    """Return x in the dtype of `weight`, or x itself under autocast, which casts."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


class LoraStack(nn.Module):
    """The adapters of E experts for one linear layer (in -> out): `expand(shrink(x) * mask)`."""

    def __init__(self, linear: nn.Linear, experts: int, config: MixLoraConfig):
        super().__init__()
        self.scale, self.dropout = config.lora_alpha / config.r, nn.Dropout(config.lora_dropout)
        weight = wide(linear.weight)
        (out, width), bound = weight.shape, weight.shape[1] ** -0.5  # as in LoRA
        self.lora_A = nn.Parameter(weight.new_empty(experts, config.r, width).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(weight.new_zeros(experts, out, config.r))

    def shrink(self, x):
        """x (N, in) -> (N, E*R), the ranks of all experts."""
        return F.linear(self.dropout(cast_like(x, self.lora_A)), self.lora_A.flatten(0, 1))

    def expand(self, ranks):
        """ranks (N, E*R), zeros for experts that were not chosen -> (N, out)."""
        return ranks @ (self.scale * self.lora_B.mT).flatten(0, 1)


def adapters(base: SwiGLU, experts: int, config: MixLoraConfig) -> nn.ModuleDict:
    """Return a `LoraStack` for each projection of a feed-forward."""
    return nn.ModuleDict({name: LoraStack(getattr(base, name), experts, config) for name in PROJECTIONS})


class MixLoraMLP(nn.Module):
    """`forward(x)`: (B, T, C) -> (B, T, C) and the `Routing` of its N = B*T tokens.

    It replaces `base`, whose three linear layers keep their names here.
    """

    def __init__(self, base: SwiGLU, config: MixLoraConfig):
        super().__init__()
        weight, E = base.gate_proj.weight, config.num_experts
        router = ModelConfig(
            hidden_size=weight.shape[1], n_routed_experts=E, num_experts_per_tok=config.num_experts_per_tok,
            scoring_func="softmax",
        )  # fmt: skip
        self.gate = TopkRouter(router).to(wide(weight))  # its device and dtype
        nn.init.normal_(self.gate.weight, std=0.02)
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj
        self.lora_experts = adapters(base, E, config)
        self.lora_shared = adapters(base, 1, config) if config.shared_expert else None
        self.train(base.training)

    def always(self, name: str, x):
        """x (N, in) -> (N, out), the part of one projection that all experts share."""
        layer = getattr(self, name)
        y = layer(cast_like(x, layer.weight))
        if self.lora_shared is not None:
            y = y + self.lora_shared[name].expand(self.lora_shared[name].shrink(x))
        return y

    def forward(self, x) -> tuple[torch.Tensor, Routing]:
        """(B, T, C) -> (B, T, C), Routing."""
        tokens = x.flatten(0, -2)  # (B, T, C) -> (N, C)
        routing = self.gate(tokens)
        gate, up = self.always("gate_proj", tokens), self.always("up_proj", tokens)  # (N, F)
        lora_gate, lora_up, lora_down = self.lora_experts.values()
        gate_ranks, up_ranks = lora_gate.shrink(tokens), lora_up.shrink(tokens)  # (N, E*R)
        E, R = lora_gate.lora_A.shape[:2]
        masks = F.one_hot(routing.indices, E).to(gate_ranks.dtype).repeat_interleave(R, dim=2)  # (N, K, E*R)
        weights = routing.weights.to(gate.dtype)  # (N, K)
        mixed, down_ranks = 0, 0
        for mask, weight in zip(masks.unbind(1), weights.split(1, dim=1), strict=True):  # one chosen expert
            inner = F.silu(gate + lora_gate.expand(gate_ranks * mask))  # (N, F)
            inner = inner * (up + lora_up.expand(up_ranks * mask)) * weight  # g_k h_k
            mixed = mixed + inner
            down_ranks = down_ranks + lora_down.shrink(inner) * mask
        y = self.always("down_proj", mixed) + lora_down.expand(down_ranks)
        return cast_like(y, self.down_proj.weight).view(x.shape), routing


class MixLoraMoE(nn.Module):
    """A mixture of experts whose shared experts are a `MixLoraMLP`. It returns the routing of the LoRA
    experts, since the router of the frozen experts is not trained."""

    def __init__(self, base: MoE, config: MixLoraConfig):
        super().__init__()
        self.gate, self.experts = base.gate, base.experts
        self.shared_experts = MixLoraMLP(base.shared_experts, config)
        self.shared_expert_gate = base.shared_expert_gate
        self.train(base.training)

    def forward(self, x) -> tuple[torch.Tensor, Routing]:
        """(B, T, C) -> (B, T, C), Routing."""
        tokens = x.flatten(0, -2)  # (B, T, C) -> (N, C)
        frozen = self.gate(tokens)
        y = self.experts(tokens, frozen.indices, frozen.weights).view(x.shape)
        shared, routing = self.shared_experts(x)
        return y + gated(shared, self.shared_expert_gate, x), routing


def add_mixlora(model, config: MixLoraConfig) -> None:
    """Add a mixture to every layer of a `TinySeek` but not to its MTP head.

    Raises `UserError`, and leaves the model unchanged, for a layer with experts but without shared ones.
    """
    for number, layer in enumerate(model.model.layers):
        if isinstance(layer.mlp, MoE) and layer.mlp.shared_experts is None:
            raise UserError(
                f"mixlora adapts the shared experts of a layer with experts, and layer {number} has none "
                "(model.n_shared_experts=0): use another base, or lora"
            )
    for layer in model.model.layers:
        layer.mlp = (MixLoraMoE if isinstance(layer.mlp, MoE) else MixLoraMLP)(layer.mlp, config)
        layer.has_experts = True


def lesson():
    """Fit two kinds of tokens that need different changes of one frozen layer: one LoRA of rank 16 against 8
    experts of rank 2, which have about as many parameters."""
    torch.manual_seed(0)
    base, *wanted = (SwiGLU(16, 32).requires_grad_(False) for _ in range(3))
    for name in PROJECTIONS:
        start = getattr(base, name).weight.normal_(0, 0.3)
        for kind in wanted:  # each the base, changed in rank 2
            change = torch.randn(len(start), 2) @ torch.randn(2, start.shape[1]) / 16
            getattr(kind, name).weight.copy_(start + change)
    print("One frozen feed-forward and two kinds of tokens, each of which needs a change of its own")
    for experts, chosen, rank in ((1, 1, 16), (8, 2, 2)):
        mixture = MixLoraMLP(base, MixLoraConfig(experts, chosen, rank, lora_alpha=2 * rank))
        optimizer = torch.optim.Adam([w for w in mixture.parameters() if w.requires_grad], lr=0.02)
        for _ in range(80):
            x = torch.randn(2, 128, 16) + torch.tensor([-1.0, 1.0])[:, None, None]  # (kind, token, C)
            y = torch.stack([kind(part) for kind, part in zip(wanted, x, strict=True)])
            out, routing = mixture(x)
            error = (out - y).square().mean() / y.var()
            optimizer.zero_grad(), error.backward(), optimizer.step()
        print(f"  {experts} of rank {rank}: error {error:.4f} after 80 steps; tokens of each kind by expert:")
        print(*[f"    {kind.bincount(minlength=experts).tolist()}" for kind in routing.indices.view(2, -1)])


if __name__ == "__main__":
    lesson()
