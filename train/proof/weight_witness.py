"""Proof that training moved the weights: after the last step each is compared with its initial value.

A gradient before the first step (`train/proof/gradient_check.py`) is a promise. A weight moves only if the
optimizer holds it, its learning rate is above zero, each step is larger than the rounding of the weight, and
gradients keep coming until the end.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import torch

from train.proof.model_check import balances, describe, some
from utils.errors import UserError

UNREACHED = "no gradient reached it, so that weight decay alone acted on it"


@dataclass
class Note:
    """The steps of one parameter."""

    decay: float = 1.0  # the product of (1 - lr * weight_decay)
    steps: int = 0
    live: int = 0  # steps with a learning rate above zero
    state: dict = field(default_factory=dict)  # its optimizer's memory of past gradients


class WeightWitness:
    """Keeps the initial weights, and proves at the end that exactly the trainable ones have moved.

    Weight decay shrinks a weight even if no gradient ever reaches it. So the witness keeps, for each
    parameter, the product of (1 - lr * weight_decay) over the steps. Decay alone leads from the initial value
    w to s * w for some s between that product and 1, and a weight was trained if it is anywhere else.
    (Decoupled decay, as in AdamW and Muon.) Initial values are kept on the CPU; of frozen tensors and
    buffers only a fingerprint. Of the buffers, only the biases of trainable routers may change.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, named = model, dict(model.named_parameters())
        self.start = {name: p.detach().to("cpu", copy=True) for name, p in named.items() if p.requires_grad}
        self.frozen = {name: fingerprint(p) for name, p in named.items() if not p.requires_grad}
        fixed = [(name, b) for name, b in model.named_buffers() if not balances(model, name)]
        self.buffers = {name: fingerprint(b) for name, b in fixed}
        self.notes = {}  # by id of the parameter
        self.hits = {}  # by ids of the parameters that had a gradient: in how many steps each was not zero

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note one optimizer step. Call it after the step, before `zero_grad` and the next learning rate."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                note = self.notes.setdefault(id(parameter), Note())
                note.decay *= 1 - group["lr"] * group.get("weight_decay", 0)
                note.steps += 1
                note.live += group["lr"] > 0
                note.state = optimizer.state.get(parameter, {})
        live = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if live:  # one number per tensor, added up where it is: nothing waits for the device
            hits = torch.stack(torch._foreach_norm([parameter.grad for parameter in live])) > 0
            key = tuple(map(id, live))
            self.hits[key] = self.hits.get(key, 0) + hits.long()

    def prove_moved(self) -> str:
        """Return one line about how far the weights moved. Raise `UserError` naming those that misbehaved."""
        if not self.notes:
            return "weights not compared: no step was taken"
        parameters = dict(self.model.named_parameters())
        if new := parameters.keys() ^ (self.start.keys() | self.frozen.keys()):
            raise UserError(f"added or removed during training: {', '.join(sorted(new)[:3])}")
        if changed := differing(self.frozen, parameters):
            raise UserError(f"frozen, yet changed by training: {describe(self.model, changed)}")
        if changed := differing(self.buffers, dict(self.model.named_buffers())):
            raise UserError(
                f"a buffer that nothing trains, yet changed by training: {describe(self.model, changed)}; "
                "was the bias of a frozen router balanced?"
            )
        relative, stuck = {}, {}
        for name, start in self.start.items():
            now, first = parameters[name].detach().to("cpu", torch.float64), start.double()
            note = self.notes.get(id(parameters[name]), Note())
            if not torch.isfinite(now).all():
                raise UserError(f"training made it infinite or NaN: {describe(self.model, [name])}; lower lr")
            if learned(first, now, note, torch.finfo(start.dtype).eps):
                relative[name] = ((now - first).norm() / first.norm().clamp_min(1e-12)).item()
            else:
                stuck.setdefault(reason(note, start.dtype), []).append(name)
        zeros = {name for name, start in self.start.items() if not start.any()}
        if max(note.live for note in self.notes.values()) == 1 and zeros and zeros <= relative.keys():
            stuck.pop(UNREACHED, None)  # what precedes zeros, like LoRA's A, moves from the second step on
        if stuck:
            words = [f"{describe(self.model, names)}: {why}" for why, names in stuck.items()]
            raise UserError(f"trainable, yet not moved by training: {'; '.join(words)}")
        gaps = self.prove_steady(parameters)
        ratios = [ratio for name, ratio in relative.items() if name not in zeros] or [0.0]
        return (
            f"weights proven: {len(relative)} trainable tensors moved ({min(ratios):.2g} to {max(ratios):.2g}"
            f" of their size), {len(self.start) - len(relative)} had no gradient (allowed), "
            f"{len(self.frozen)} frozen ones are unchanged{gaps}"
        )

    def prove_steady(self, parameters: dict[str, torch.Tensor]) -> str:
        """Raise `UserError` if a tensor had no gradient in over a tenth of the steps: a layer that freezes in
        the middle of a run has moved, and stopped. Describe the parameters that missed a few steps.

        Two missed steps are always allowed: a gradient passes zeros only after they have moved."""
        counts = Counter()
        for keys, hits in self.hits.items():
            counts.update(dict(zip(keys, hits.tolist(), strict=True)))
        notes = {name: self.notes.get(id(parameters[name]), Note()) for name in self.start}
        gaps = {name: note.steps - counts[id(parameters[name])] for name, note in notes.items()}
        if lost := [name for name, gap in gaps.items() if gap > max(2, notes[name].steps // 10)]:
            steps = notes[lost[0]].steps
            raise UserError(
                f"trained in {steps - gaps[lost[0]]} of {steps} steps only: {describe(self.model, lost)}; "
                "was it frozen or detached after training began?"
            )
        rare = [name for name, gap in gaps.items() if gap > 2]
        return f"; without gradient in some steps: {some(rare)}" if rare else ""


def differing(fingerprints: dict[str, str], tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that are gone or have changed in any bit."""
    return [name for name, before in fingerprints.items()
            if name not in tensors or fingerprint(tensors[name]) != before]  # fmt: skip


def learned(first: torch.Tensor, now: torch.Tensor, note: Note, eps: float) -> bool:
    """Return True if decay alone cannot explain a weight's change, in fp64; `eps` is that of its dtype."""
    if ((now - first) * now > 0).any():  # decay never makes a number larger, nor of the other sign
        return True
    shrunk = ((now * first).sum() / (first * first).sum().clamp_min(1e-30)).clamp(note.decay, 1.0)
    # each decay step rounds once; without decay nothing rounds, and any change counts
    rounding = 0 if note.decay == 1.0 else eps * note.live * first.norm()
    return bool((now - shrunk * first).norm() > rounding)


def reason(note: Note, dtype: torch.dtype) -> str:
    """Return the likely reason that a parameter did not move."""
    if not note.steps:
        return "not in the optimizer"
    if not note.live:
        return "the learning rate was 0 in every step"
    moments = [part for what, part in note.state.items() if what != "step"]
    if any(torch.is_tensor(part) and part.any() for part in moments):
        return f"got gradients, but its steps were rounded away in {dtype}: use fp32 weights or a higher lr"
    return UNREACHED


def fingerprint(tensor: torch.Tensor) -> str:
    """Return a hash of the bits of `tensor`."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()
