"""A model on several processes: placement, gradient sums, storage and comparison.

`DataParallel` keeps the whole model in every process; a single process is the plain case. A sharded form
would have the same methods and replace parameters in `prepare`, after the gradient proof, which makes copies.
"""

import torch
from torch import nn

from train.proof.weight_witness import WeightWitness
from utils import distributed
from utils.checkpoint import load_weights, weights_digest
from utils.errors import UserError


class DataParallel:
    """Every process holds the whole model."""

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Move a model to the device and give all processes the weights of the first."""
        model.to(device)
        parts = [f"{n} {tuple(p.shape)} {p.requires_grad}" for n, p in model.named_parameters()]
        distributed.same_on_all_ranks("\n".join(parts), "trainable parameters, or the shapes of all")
        distributed.broadcast_parameters(model)

    def prepare(self, model: nn.Module, compiled: bool) -> nn.Module:
        """Return the model to run in training. A compiled one is another object over the same weights."""
        if not compiled:
            return model
        if isinstance(model, nn.ModuleDict):
            return nn.ModuleDict({name: torch.compile(part) for name, part in model.items()})
        return torch.compile(model)

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum the gradients over all processes."""
        distributed.sum_gradients(model.parameters())

    def clip(self, model: nn.Module, limit: float) -> float:
        """Clip the gradient norm to `limit` (0: no limit); return the norm before."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, limit or float("inf"))

    def state_dict(self, model: nn.Module, names=None) -> dict[str, torch.Tensor]:
        """Return the whole weights, or those called `names`."""
        return {name: part for name, part in model.state_dict().items() if names is None or name in names}

    def load(self, model: nn.Module, weights: dict, where: str, names=None) -> None:
        """Copy `weights` into the model; `where` names their source in errors."""
        load_weights(model, weights, where, names)

    def digest(self, model: nn.Module) -> str:
        """Return a digest of all weights. Raises `UserError` if the processes have drifted apart."""
        digest = weights_digest(model.state_dict())
        distributed.same_on_all_ranks(digest, "weights, which have drifted apart")
        return digest

    def witness(self, model: nn.Module) -> WeightWitness:
        """Return a witness of the current weights, for the proof after training."""
        return WeightWitness(model)


class FrozenModels:
    """Models that are used but not trained, such as a teacher: placed, frozen, and proven unchanged."""

    def __init__(self, models: dict[str, nn.Module], parallel: DataParallel, device: torch.device):
        self.models = models
        for model in models.values():
            parallel.place(model.requires_grad_(False).eval(), device)
        self.digests = self.digest()

    def digest(self) -> dict[str, str]:
        """Return a digest of all weights of each model."""
        return {name: weights_digest(model.state_dict()) for name, model in self.models.items()}

    def prove_unchanged(self) -> None:
        """Raise `UserError` if one is not bit-identical to what it was."""
        now = self.digest()
        if changed := [name for name, digest in self.digests.items() if now[name] != digest]:
            raise UserError(f"the frozen model {changed[0]} was changed by training: is it in an optimizer?")
