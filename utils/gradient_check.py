"""Proof that training trains: gradients checked before the first step, movement checked after the last.

A model with half of its parameters cut off still learns something, and its loss curve looks like any other.
So before a run `prove_gradients_before` sends one batch forth and back through a copy, and after it
`WeightWitness.prove_moved` compares every weight with what it was.

The copy has small random numbers where the model has tensors of zeros: a projection that starts at zero
(LoRA's B, the last layer of each block under `zero_init_residual`) passes no gradient to what lies before it
on the very first step, and a healthy model would look broken.
"""

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import MappingProxyType

import torch

from utils.device import random_state, set_random_state
from utils.errors import UserError

NOISE = 0.02  # standard deviation of the numbers that replace zeros in the copy


@dataclass
class GradientReport:
    """What `prove_gradients_before` found. Groups map a part of the model to its number of parameters."""

    trainable: dict[str, int]
    frozen: dict[str, int]
    starts_at_zero: list[str]
    reached_by: dict[str, int]  # for each loss term, how many tensors it trains
    unreached: list[str]  # allowed to be without gradient, and experts that no token chose

    def __str__(self) -> str:
        terms = ", ".join(f"{term} trains {count} tensors" for term, count in self.reached_by.items())
        lines = [f"gradients proven: {terms}"]
        for title, groups in (("trainable", self.trainable), ("frozen", self.frozen)):
            parts = ", ".join(f"{name} {count:,}" for name, count in groups.items())
            lines.append(f"  {title:<9} {sum(groups.values()):>13,}  {parts}".rstrip())
        if self.starts_at_zero:
            lines.append(f"  starts at zero: {', '.join(grouped(self.starts_at_zero))}")
        if self.unreached:
            lines.append(f"  not reached by this batch, as may be: {some(self.unreached)}")
        return "\n".join(lines)


def prove_gradients_before(
    model: torch.nn.Module,
    loss_fn: Callable,
    batches: list,
    may_be_unreached: Callable[[str], bool] = lambda name: False,
    claims: Mapping[str, Callable[[str], bool]] = MappingProxyType({}),
) -> GradientReport:
    """Prove on a copy of `model` that every trainable parameter gets a gradient, and no frozen one.

    `loss_fn(model, batches)` returns the loss, or a dictionary of its terms, each of which must train
    something. It must use the model that it is given. `may_be_unreached(name)` excuses parameters that a
    batch may miss. `claims` says of a term which parameters it must reach: a balance loss that became a
    constant still leaves the router the gradient of the language-model loss, and would go unnoticed. The
    model, its gradients and the random states are left as they were. Raises `UserError` naming the
    parameters, the modules they belong to and the likely cause.
    """
    check_one_device(model, batches)
    before = random_state()
    trial = copy.deepcopy(model)
    try:
        starts_at_zero = fill_zeros(trial)
        frozen = [name for name, parameter in trial.named_parameters() if not parameter.requires_grad]
        trainable = [name for name, parameter in trial.named_parameters() if parameter.requires_grad]
        if not trainable:
            raise UserError("no trainable parameter: everything is frozen, so there is nothing to learn")
        with torch.enable_grad():
            losses = loss_fn(trial, batches)
        losses = losses if isinstance(losses, Mapping) else {"loss": losses}
        reached, idle = reached_parameters(trial, losses)
    finally:
        set_random_state(before)

    parameters = dict(trial.named_parameters())
    if woken := [name for name in frozen if any(name in names for names in reached.values())]:
        raise UserError(f"frozen, yet it gets a gradient: {describe(trial, woken)}; who set requires_grad?")
    union = set().union(*reached.values())
    missed = [name for name in trainable if name not in union]
    cut_off = [name for name in missed if not may_be_unreached(name)]
    if cut_off:
        raise UserError(
            f"cut off from the loss, so never trained: {describe(trial, cut_off)}; is it used in the "
            "forward, or is there a detach(), an .item() or a multiplication by zero on the way?"
        )
    for term in reached.keys() & claims.keys():
        promised = [name for name in trainable if claims[term](name) and name not in reached[term]]
        if promised:
            raise UserError(f"{term} does not reach what it should train: {describe(trial, promised)}")
    return GradientReport(
        trainable=count_by_group({name: parameters[name] for name in trainable}),
        frozen=count_by_group({name: parameters[name] for name in frozen}),
        starts_at_zero=[name for name in starts_at_zero if name in trainable],
        reached_by={term: len(names) for term, names in reached.items()},
        unreached=missed + idle,
    )


def fill_zeros(model: torch.nn.Module) -> list[str]:
    """Give every parameter that is all zeros small random values, always the same; returns their names."""
    generator = torch.Generator().manual_seed(0)  # its own, so that the global one is not disturbed
    names = []
    for name, parameter in model.named_parameters():
        if not parameter.detach().any():
            names.append(name)
            noise = torch.randn(parameter.shape, generator=generator) * NOISE
            parameter.data.copy_(noise)
    return names


def reached_parameters(model: torch.nn.Module, losses: Mapping[str, torch.Tensor]):
    """For each loss term, the names of the parameters that it gives a finite, non-zero gradient; and of the
    stacks of experts, how many got nothing from any term (no token chose them)."""
    reached, used = {}, {}  # used: for each stack of experts, which of them got a gradient
    for term, loss in losses.items():
        if (
            not isinstance(loss, torch.Tensor) or loss.grad_fn is None
        ):  # requires_grad_(True) makes no graph either
            raise UserError(
                f"{term} has no graph behind it, so it cannot train anything: was it computed under "
                "no_grad(), detached, or turned into a number with .item()?"
            )
        if not torch.isfinite(loss).all():
            raise UserError(
                f"{term} is {loss.item()} on the first batch: check the data and the initial weights"
            )
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if broken := [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]:
            raise UserError(f"{term} gives gradients that are not finite: {describe(model, broken)}")
        reached[term] = {name for name, gradient in gradients.items() if gradient.any()}
        for name, gradient in gradients.items():
            if gradient.dim() == 3:
                used[name] = used.get(name, False) | gradient.flatten(1).any(dim=1)
        if not reached[term]:
            raise UserError(
                f"{term} reaches no trainable parameter: is it computed from the model it is given?"
            )
    model.zero_grad(set_to_none=True)
    idle = {name: len(flags) - int(flags.sum()) for name, flags in used.items() if flags.any()}
    words = [f"{count} of {len(used[name])} experts of {name}" for name, count in idle.items() if count]
    return reached, words


# --- one device -----------------------------------------------------------------------------------


def check_one_device(model: torch.nn.Module, batches) -> None:
    """Raise `UserError` naming the tensor that is not where the others are."""
    places = {f"parameter {name}": parameter.device for name, parameter in model.named_parameters()}
    places |= {f"buffer {name}": buffer.device for name, buffer in model.named_buffers()}
    places |= {name: tensor.device for name, tensor in tensors_in(batches, "batches")}
    if not places:
        return
    usual = Counter(places.values()).most_common(1)[0][0]
    if odd := [f"{name} is on {device}" for name, device in places.items() if device != usual]:
        raise UserError(f"everything must be on one device: {some(odd)}; the others are on {usual}")


def tensors_in(value, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors within nested dictionaries, lists, tuples and dataclasses, with their places."""
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_in(part, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors_in(part, f"{where}[{index}]")
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name), f"{where}.{item.name}")


# --- after the last step --------------------------------------------------------------------------


class WeightWitness:
    """Remembers the weights at the start, and proves at the end that exactly the trainable ones have moved.

    Weight decay shrinks a weight even if no gradient ever reaches it. So the witness keeps, for each
    parameter, the product of (1 - lr * weight_decay) over the steps. Decay alone leads from the first value w
    to s * w for some s between that product and 1, and a weight has learned if it is anywhere else.
    (Decoupled decay, as in AdamW and Muon.) The first values are kept on the CPU, of frozen tensors only a
    fingerprint.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.start = {}
        self.fingerprints = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.start[name] = parameter.detach().to("cpu", copy=True)
            else:
                self.fingerprints[name] = fingerprint(parameter)
        self.decay = {}  # by id of the parameter: the product of (1 - lr * weight_decay)
        self.steps = {}  # by id of the parameter: optimizer steps with a learning rate above zero

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Call once per optimizer step, while the groups still hold the learning rates of that step."""
        for group in optimizer.param_groups:
            factor = 1 - group["lr"] * group.get("weight_decay", 0)
            for parameter in group["params"]:
                key = id(parameter)
                self.decay[key] = self.decay.get(key, 1.0) * factor
                self.steps[key] = self.steps.get(key, 0) + (group["lr"] > 0)

    def prove_moved(self, may_be_unreached: Callable[[str], bool] = lambda name: False) -> str:
        """One line about how far the weights moved. Raises `UserError` naming those that did not behave."""
        if not self.steps:
            return "weights not compared: no step was taken"
        parameters = dict(self.model.named_parameters())
        changed = [
            name for name, before in self.fingerprints.items() if fingerprint(parameters[name]) != before
        ]
        if changed:
            raise UserError(f"frozen, yet changed by training: {describe(self.model, changed)}")
        relative, stuck = {}, {}
        for name, start in self.start.items():
            key = id(parameters[name])
            now = parameters[name].detach().to("cpu", torch.float64)
            if not torch.isfinite(now).all():
                raise UserError(
                    f"training made it infinite or NaN: {describe(self.model, [name])}; lower the lr"
                )
            first = start.double()
            decay = self.decay.get(key, 1.0)
            shrunk = ((now * first).sum() / (first * first).sum().clamp_min(1e-30)).clamp(decay, 1.0)
            # each decay step rounds once; without decay nothing rounds, and any change counts
            rounding = 0 if decay == 1.0 else torch.finfo(start.dtype).eps * self.steps[key] * first.norm()
            if (now - shrunk * first).norm() > rounding:
                relative[name] = ((now - first).norm() / first.norm().clamp_min(1e-12)).item()
            elif not may_be_unreached(name):
                stuck.setdefault(self.why(key), []).append(name)
        if stuck:
            words = [f"{describe(self.model, names)}: {why}" for why, names in stuck.items()]
            raise UserError(f"trainable, yet not moved by training: {'; '.join(words)}")
        ratios = [ratio for name, ratio in relative.items() if self.start[name].any()] or [0.0]
        return (
            f"weights proven: {len(relative)} trainable tensors moved ({min(ratios):.2g} to {max(ratios):.2g}"
            f" of their size), {len(self.start) - len(relative)} had no gradient, as may be, "
            f"{len(self.fingerprints)} frozen ones are unchanged"
        )

    def why(self, key: int) -> str:
        """The likely cause why a parameter did not move."""
        if key not in self.steps:
            return "not in the optimizer"
        if not self.steps[key]:
            return "the learning rate was 0 in every step"
        return "no gradient reached it, so that weight decay alone acted on it"


def fingerprint(tensor: torch.Tensor) -> str:
    """A hash of the bits of `tensor`."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()


# --- words ----------------------------------------------------------------------------------------


def group_of(name: str) -> str:
    """`layers.3.self_attn.q_proj.weight` -> `layers.*.self_attn`: the part that a parameter belongs to."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    if "*" in parts:
        return ".".join(parts[: parts.index("*") + 2])
    return ".".join(parts[:-1]) or name


def count_by_group(parameters: dict[str, torch.Tensor]) -> dict[str, int]:
    """Number of parameters of each group, in the order of the model."""
    counts = {}
    for name, parameter in parameters.items():
        counts[group_of(name)] = counts.get(group_of(name), 0) + parameter.numel()
    return counts


def grouped(names: list[str]) -> list[str]:
    """The names with layer numbers replaced by stars, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def describe(model: torch.nn.Module, names: list[str]) -> str:
    """The first few parameters, each with the kind of module it belongs to, and how many there are."""
    kinds = [type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in names]
    return some([f"{name} (in {kind})" for name, kind in zip(names, kinds)])


def some(names: list[str], count: int = 3) -> str:
    """The first names, and how many there are in all if there are more."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
