"""Build the optimizers and assign each parameter to one.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) gives each number its own sign-like step; Muon
(`modules/muon.py`) moves each matrix as a whole. Muon is for matrices that map between layers. The embedding
and the output head are tables of vectors and stay with AdamW, as do routers (a vector per expert), the gate
of shared experts (a vector), gains, biases, DoRA's magnitudes and T5's table of relative positions. A
stack of E experts counts as E matrices.
Weight decay is for matrices only: pulling a gain towards zero has no use.

T5 adds that table to attention scores without scaling, and a head that looks at one place alone needs
differences of 5 and more. Adam moves a number by about `lr` per step, so the table gets a multiple of it.
"""

import torch

from config.schema import OptimConfig
from modules.muon import Muon

TABLES = ("embed_tokens.weight", "embed_positions.weight", "embed_token_types.weight", "lm_head.weight",
          ".gate.weight", "shared_expert_gate.weight", "embed_tokens.prompt", "relative_bias.weight")
DISTANCES, DISTANCE_RATE = "relative_bias.weight", 20
LENGTHS = "lora_magnitude_vector"  # those of experts form a table (E, out)


def build_optimizers(model: torch.nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return one or two optimizers that cover every trainable parameter once; groups keep `initial_lr`."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trainable.items() if p.dim() >= 2 and LENGTHS not in name}
    hidden = {name: p for name, p in matrices.items() if p.dim() < 4 and not name.endswith(TABLES)}
    muon = hidden if optim.optimizer == "muon" else {}
    rest = {name: p for name, p in trainable.items() if name not in muon}
    distances = [p for name, p in rest.items() if name.endswith(DISTANCES)]
    decayed = [p for name, p in rest.items() if name in matrices and not name.endswith(DISTANCES)]
    plain = [p for name, p in rest.items() if name not in matrices]

    optimizers = []
    if muon:
        two = {name for name in muon if name.endswith("gate_up_proj") or "lora_B.gate_up_proj" in name}
        double = [p for name, p in muon.items() if name in two]  # gate above up
        single = [p for name, p in muon.items() if name not in two]
        groups = [{"params": single}] + ([{"params": double, "parts": 2}] if double else [])
        settings = {"momentum": optim.muon_momentum, "weight_decay": optim.weight_decay}
        optimizers.append(Muon(groups, lr=optim.muon_lr, **settings))
    adam = torch.optim.Adam if optim.optimizer == "adam" else torch.optim.AdamW
    decay = 0.0 if optim.optimizer == "adam" else optim.weight_decay  # Adam's own is L2, not decoupled decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0},
              {"params": distances, "weight_decay": 0.0, "lr": DISTANCE_RATE * optim.lr}]
    fused = {p.device.type for p in rest.values()} <= {"cpu", "cuda"}
    if groups := [group for group in groups if group["params"]]:
        betas = (optim.beta1, optim.beta2)
        optimizers.append(adam(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to its initial one times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
