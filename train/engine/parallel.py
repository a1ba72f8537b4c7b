"""A model on several processes, each of which holds the whole of it.

A sharded version would replace these functions: shard parameters in `prepare` (after the gradient proof,
which makes copies), clip across shards, and gather whole weights for checkpoints.
"""

import torch
from torch import nn

from utils import distributed


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to the device and give all processes the weights of the first."""
    model.to(device)
    parts = [f"{n} {tuple(p.shape)} {p.requires_grad}" for n, p in model.named_parameters()]
    distributed.same_on_all_ranks("\n".join(parts), "trainable parameters, or the shapes of all")
    distributed.broadcast_parameters(model)


def prepare(model: nn.Module, compiled: bool) -> nn.Module:
    """Return the model to run in training. A compiled one is another object over the same weights."""
    if compiled and isinstance(model, nn.ModuleDict):
        return nn.ModuleDict({name: torch.compile(part) for name, part in model.items()})
    return torch.compile(model) if compiled else model


def clip(model: nn.Module, limit: float) -> torch.Tensor:
    """Clip the gradient norm to `limit` (0: no limit); return the norm before."""
    return nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))


def state_dict(model: nn.Module, names=None) -> dict[str, torch.Tensor]:
    """Return all weights, or those in `names`."""
    return {name: part for name, part in model.state_dict().items() if names is None or name in names}
