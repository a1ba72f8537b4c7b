"""Build the optimizers and assign each parameter to one.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) gives each number its own sign-like step; Muon
(`modules/muon.py`) moves each matrix as a whole. Muon is for matrices that map between layers. The embedding
and the output head are tables of vectors and stay with AdamW, as do routers (a vector per expert), the gate
of shared experts (a vector), gains, biases, DoRA's magnitudes and T5's table of relative positions. A
stack of E experts counts as E matrices.
Weight decay is for matrices only: pulling a gain towards zero has no use.

T5 does not scale attention scores, which asks for two rates of its own (docs/experiments.md, 51). Queries
take steps of 1/sqrt(D), the factor that other models apply to the scores: with full steps the scores soon
grow so large that the softmax picks one key and stops learning. The table of positions is added to the
scores; a head that looks at one place alone needs differences of 5 and more, and Adam moves a number by about
`lr` per step, so the table gets a multiple of it.
"""

import torch

from config.schema import OptimConfig
from modules.attention.relative import RelativeAttention, RelativeBias
from modules.muon import Muon

TABLES = ("embed_tokens.weight", "embed_positions.weight", "embed_token_types.weight", "lm_head.weight",
          ".gate.weight", "shared_expert_gate.weight", "embed_tokens.prompt", "relative_bias.weight")
POSITIONS, POSITIONS_RATE = "relative_bias.weight", 20
LENGTHS = "lora_magnitude_vector"  # those of experts form a table (E, out)


def build_optimizers(model: torch.nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return one or two optimizers that cover every trainable parameter once; groups keep `initial_lr`."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trainable.items() if p.dim() >= 2 and LENGTHS not in name}
    hidden = {name: p for name, p in matrices.items() if p.dim() < 4 and not name.endswith(TABLES)}
    muon = hidden if optim.optimizer == "muon" else {}
    rest = {name: p for name, p in trainable.items() if name not in muon}
    rates, optimizers = own_rates(model), []
    if muon:
        two = {name for name in muon if name.endswith("gate_up_proj") or "lora_B.gate_up_proj" in name}
        single = by_rate({name: p for name, p in muon.items() if name not in two}, rates, optim.muon_lr)
        double = [{"params": [muon[name] for name in muon if name in two], "parts": 2}]  # gate above up
        settings = {"momentum": optim.muon_momentum, "weight_decay": optim.weight_decay}
        optimizers.append(Muon([*single, *double * bool(two)], lr=optim.muon_lr, **settings))
    adam = torch.optim.Adam if optim.optimizer == "adam" else torch.optim.AdamW
    decay = 0.0 if optim.optimizer == "adam" else optim.weight_decay  # Adam's own is L2, not decoupled decay
    decayed = {name for name in rest if name in matrices and not name.endswith(POSITIONS)}
    groups = [group | {"weight_decay": decay * chosen} for chosen in (True, False) for group in
              by_rate({name: p for name, p in rest.items() if (name in decayed) == chosen}, rates, optim.lr)]
    fused = {p.device.type for p in rest.values()} <= {"cpu", "cuda"}
    if groups:
        betas = (optim.beta1, optim.beta2)
        optimizers.append(adam(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def own_rates(model: torch.nn.Module) -> dict[str, float]:
    """Return the parameters of a T5 with another learning rate than the rest, as factors of it."""
    rates = {}
    for name, part in model.named_modules():
        if isinstance(part, RelativeBias):
            rates[f"{name}.weight"] = POSITIONS_RATE
        elif isinstance(part, RelativeAttention):
            rates[f"{name}.q_proj.weight"] = part.head_dim**-0.5
    return rates


def by_rate(parameters: dict[str, torch.nn.Parameter], rates: dict[str, float], lr: float) -> list[dict]:
    """Return these parameters as groups of an optimizer, one per learning rate, that of the rest first."""
    groups = {1.0: []}
    for name, parameter in parameters.items():
        groups.setdefault(rates.get(name, 1.0), []).append(parameter)
    return [{"params": own, "lr": rate * lr} for rate, own in groups.items() if own]


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to its initial one times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
