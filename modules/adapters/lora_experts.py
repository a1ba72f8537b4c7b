"""LoRA for stacked experts: every routed expert of a mixture gets low-rank factors of its own.

    W'_e = W_e + s B_e A_e        for e = 1..E, once for gate and up together, once for down

    gate_up_proj W: (E, 2F, C)   A: (E, R, C)   B: (E, 2F, R)
    down_proj    W: (E, C, F)    A: (E, R, F)   B: (E, C, R)      tokens (N, C) -> (N, C)

A linear layer adds B (A x) to its output and never builds B A. Experts meet their tokens in one fast pass
(modules/experts/grouped.py) that takes matrices, so here the matrices are built, all E in one batched
product. Building them costs R multiplications per weight, using them one per weight and token: little, as
long as an expert sees many more than R tokens. DoRA comes for free, as W'_e is there in full; dropout of the
adapter's input is impossible, since the adapter has no input of its own.

Size: E times the factors of one expert. An expert is narrow, and a rank of F is already everything: small
ranks make sense here.

LoRA: Hu et al., arXiv 2106.09685. The same sum as with peft's `target_parameters`, whose factors lie flat:
(E*R, in) and (out, R*E).
Trap: in bf16 the sum W + s B A is rounded, unlike the two separate products of a linear layer: where it is
below 1/256 of a weight, a change comes through only in part. Its gradient comes through whole.
"""

import torch
from torch import nn

from modules.adapters.adapted_layer import Adapted
from modules.adapters.adapter_switch import AdapterSwitch
from modules.experts.moe import Experts, run_experts


class LoraExperts(Adapted):
    """`Experts` with adapters. Parameters: `lora_A.gate_up_proj.<adapter>` and so on."""

    MATRICES = ("gate_up_proj", "down_proj")

    def __init__(self, layer: Experts, switch: AdapterSwitch):
        super().__init__(layer, switch)
        self.implementation = layer.implementation

    def empty_layer(self) -> Experts:
        """Return plain experts of the same shape."""
        return Experts(*self.down_proj.shape, self.implementation)

    def empty_store(self) -> nn.ModuleDict:
        """Return a home for the factors of one kind."""
        return nn.ModuleDict({matrix: nn.ParameterDict() for matrix in self.MATRICES})

    def stores(self, matrix: str):
        """Return A, B and m of one matrix, each a dictionary by adapter."""
        return self.lora_A[matrix], self.lora_B[matrix], self.lora_magnitude_vector[matrix]

    def forward(self, x, indices, weights):
        """x (N, C), indices and weights (N, K) -> (N, C), under the adapter that each token's row uses."""
        return self.switch.by_rows(self.run, x, indices, weights)

    def run(self, name, x, indices, weights):
        """Run all of x under one adapter; None, or one that is not here, is the base."""
        matrices = [self.gate_up_proj, self.down_proj]
        if name in self.lora_A["down_proj"]:
            matrices = [self.effective(m, name).to(getattr(self, m).dtype) for m in self.MATRICES]
        return run_experts(self.implementation, x, indices, weights, *matrices)


def lesson():
    """Print the number of trainable weights of adapters on experts, and which experts one token trains."""
    from config.adapters import LoraConfig
    from modules.adapters.lora import add_lora

    torch.manual_seed(0)
    model = nn.Sequential(Experts(16, 128, 64))
    full = sum(nn.init.normal_(p, std=0.1).numel() for p in model.parameters())
    print(f"LoRA on 16 experts of 128 -> 64 -> 128, {full:,} weights")
    for rank in (1, 4, 16):
        names = add_lora(model, LoraConfig(r=rank, target_modules=["experts"]), f"rank {rank}")
        trained = sum(p.numel() for name, p in model.named_parameters() if name in names)
        print(f"  rank {rank:2d}: {trained:7,} trainable numbers, {trained / full:4.0%} of the weights")
    model[0](torch.randn(1, 128), torch.tensor([[3, 7]]), torch.ones(1, 2)).sum().backward()
    gradient = model[0].lora_B["down_proj"]["rank 16"].grad
    print("a token with experts 3 and 7 trains", gradient.flatten(1).any(1).nonzero().flatten().tolist())


if __name__ == "__main__":
    lesson()
