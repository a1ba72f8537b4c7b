"""Proof that training trained: after the last step every weight is compared with its first value.

A gradient before the first step (`train/proof/gradient_check.py`) is a promise. A weight moves only if the
optimizer holds it, its learning rate is above zero, each step is larger than the rounding of the weight, and
gradients keep coming until the end.
"""

import hashlib

import torch

from utils.errors import UserError
from train.proof.model_check import balances, describe, some

UNREACHED = "no gradient reached it, so that weight decay alone acted on it"


class WeightWitness:
    """Keeps the weights of the start, and proves at the end that exactly the trainable ones have moved.

    Weight decay shrinks a weight even if no gradient ever reaches it. So the witness keeps, for each
    parameter, the product of (1 - lr * weight_decay) over the steps. Decay alone leads from the first value w
    to s * w for some s between that product and 1, and a weight was trained if it is anywhere else.
    (Decoupled decay, as in AdamW and Muon.) First values are kept on the CPU; of frozen tensors and buffers
    only a fingerprint is kept.

    Of the buffers, only the biases of trainable routers may change.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.start, self.fingerprints = {}, {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.start[name] = parameter.detach().to("cpu", copy=True)
            else:
                self.fingerprints[name] = fingerprint(parameter)
        fixed = [(name, buffer) for name, buffer in model.named_buffers() if not balances(model, name)]
        self.buffers = {name: fingerprint(buffer) for name, buffer in fixed}
        self.decay = {}  # by id of the parameter: the product of (1 - lr * weight_decay)
        self.steps = {}  # by id of the parameter: optimizer steps with a learning rate above zero
        self.states = {}  # by id of the parameter: what its optimizer remembers of past gradients
        self.noted = {}  # by id of the parameter: all optimizer steps
        self.hits = {}  # by ids of the parameters that had a gradient: in how many steps each was not zero

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note one optimizer step. Call it after the step, before `zero_grad` and the next learning rate."""
        for group in optimizer.param_groups:
            factor = 1 - group["lr"] * group.get("weight_decay", 0)
            for parameter in group["params"]:
                key = id(parameter)
                self.decay[key] = self.decay.get(key, 1.0) * factor
                self.steps[key] = self.steps.get(key, 0) + (group["lr"] > 0)
                self.noted[key] = self.noted.get(key, 0) + 1
                self.states[key] = optimizer.state.get(parameter, {})
        live = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if live:  # one number per tensor, added up where it is: nothing waits for the device
            hits = torch.stack(torch._foreach_norm([parameter.grad for parameter in live])) > 0
            key = tuple(map(id, live))
            self.hits[key] = self.hits.get(key, 0) + hits.long()

    def prove_moved(self) -> str:
        """Return one line about how far the weights moved. Raise `UserError` naming those that misbehaved."""
        if not self.steps:
            return "weights not compared: no step was taken"
        parameters = dict(self.model.named_parameters())
        if new := parameters.keys() ^ (self.start.keys() | self.fingerprints.keys()):
            raise UserError(f"added or removed during training: {', '.join(sorted(new)[:3])}")
        self.prove_unchanged(parameters)
        relative, stuck = {}, {}
        for name, start in self.start.items():
            now = parameters[name].detach().to("cpu", torch.float64)
            if not torch.isfinite(now).all():
                raise UserError(
                    f"training made it infinite or NaN: {describe(self.model, [name])}; lower the lr"
                )
            if self.learned(start, now, id(parameters[name])):
                first = start.double()
                relative[name] = ((now - first).norm() / first.norm().clamp_min(1e-12)).item()
            else:
                stuck.setdefault(self.why(parameters[name]), []).append(name)
        zeros = {name for name, start in self.start.items() if not start.any()}
        if max(self.steps.values()) == 1 and zeros and zeros <= relative.keys():
            stuck.pop(UNREACHED, None)  # what lies before zeros, as LoRA's A, waits for the second step
        if stuck:
            words = [f"{describe(self.model, names)}: {why}" for why, names in stuck.items()]
            raise UserError(f"trainable, yet not moved by training: {'; '.join(words)}")
        gaps = self.prove_steady(parameters)
        ratios = [ratio for name, ratio in relative.items() if self.start[name].any()] or [0.0]
        return (
            f"weights proven: {len(relative)} trainable tensors moved ({min(ratios):.2g} to {max(ratios):.2g}"
            f" of their size), {len(self.start) - len(relative)} had no gradient (allowed), "
            f"{len(self.fingerprints)} frozen ones are unchanged{gaps}"
        )

    def prove_steady(self, parameters: dict[str, torch.Tensor]) -> str:
        """Raise `UserError` if a tensor had no gradient in over a tenth of the steps: a layer that freezes in
        the middle of a run has moved, and stopped. Return words about rarer gaps.

        Two steps are always allowed: what lies before zeros waits for them to move."""
        counts = {}
        for keys, hits in self.hits.items():
            for key, count in zip(keys, hits.tolist(), strict=True):
                counts[key] = counts.get(key, 0) + count
        steps = {name: self.noted.get(id(parameters[name]), 0) for name in self.start}
        gaps = {name: steps[name] - counts.get(id(parameters[name]), 0) for name in self.start}
        if lost := [name for name, gap in gaps.items() if gap > max(2, steps[name] // 10)]:
            reached, total = steps[lost[0]] - gaps[lost[0]], steps[lost[0]]
            raise UserError(
                f"trained in {reached} of {total} steps only: {describe(self.model, lost)}; was it frozen or "
                "detached after training began?"
            )
        rare = [name for name, gap in gaps.items() if gap > 2]
        return f"; without gradient in some steps: {some(rare)}" if rare else ""

    def prove_unchanged(self, parameters: dict[str, torch.Tensor]) -> None:
        """Raise `UserError` unless frozen tensors and fixed buffers are as they were, bit by bit."""
        changed = [name for name, before in self.fingerprints.items()
                   if fingerprint(parameters[name]) != before]  # fmt: skip
        if changed:
            raise UserError(f"frozen, yet changed by training: {describe(self.model, changed)}")
        buffers = dict(self.model.named_buffers())
        changed = [name for name, before in self.buffers.items()
                   if name not in buffers or fingerprint(buffers[name]) != before]  # fmt: skip
        if changed:
            raise UserError(
                f"a buffer that nothing trains, yet changed by training: {describe(self.model, changed)}; "
                "was the bias of a frozen router balanced?"
            )

    def learned(self, start: torch.Tensor, now: torch.Tensor, key: int) -> bool:
        """Return True if decay alone cannot explain where the weight is now."""
        first, decay = start.double(), self.decay.get(key, 1.0)
        if ((now - first) * now > 0).any():  # decay never makes a number larger, nor of the other sign
            return True
        shrunk = ((now * first).sum() / (first * first).sum().clamp_min(1e-30)).clamp(decay, 1.0)
        # each decay step rounds once; without decay nothing rounds, and any change counts
        rounding = 0 if decay == 1.0 else torch.finfo(start.dtype).eps * self.steps[key] * first.norm()
        return bool((now - shrunk * first).norm() > rounding)

    def why(self, parameter: torch.Tensor) -> str:
        """Return the likely reason that a parameter did not move."""
        key = id(parameter)
        if key not in self.steps:
            return "not in the optimizer"
        if not self.steps[key]:
            return "the learning rate was 0 in every step"
        moments = [part for what, part in self.states[key].items() if what != "step"]
        if any(torch.is_tensor(part) and part.any() for part in moments):
            return (
                f"its gradients came, but each step was rounded away in {parameter.dtype}: keep "
                "trainable weights in fp32, or raise the lr"
            )
        return UNREACHED


def fingerprint(tensor: torch.Tensor) -> str:
    """Return a hash of the bits of `tensor`."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()
