"""Proof that a run will train: before it, one step's data is run forward and backward through a copy.

A model with half of its parameters cut off still learns something, and its loss curve looks like any other.
So before a run `prove_gradients_before` checks the model (`train/proof/model_check.py`) and its gradients
(`train/proof/trial.py`), and after the run `WeightWitness` (`train/proof/weight_witness.py`) compares every
weight with its first value.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

import torch

from train.proof.model_check import TIES, check_model, describe, some
from train.proof.trial import Trial
from utils.device import random_state, set_random_state
from utils.errors import UserError

# A part whose gradient is so far below that of others is lost in fp32's rounding (6e-8) where it is added to
# the residual stream. In healthy models the weakest is above 1e-5.
FAINT = 1e-7


@dataclass
class GradientReport:
    """The findings of `prove_gradients_before`. Groups map a part of the model to its parameter count."""

    trainable: dict[str, int]
    frozen: dict[str, int]
    starts_at_zero: list[str]
    reached_by: dict[str, int]  # for each loss term, how many tensors it trains
    unreached: list[str]  # allowed to be without gradient, and experts that no token chose
    ratios: dict[str, float]  # for each group, its gradient norm / weight norm

    def __str__(self) -> str:
        terms = ", ".join(f"{term} trains {count} tensors" for term, count in self.reached_by.items())
        lines = [f"gradients proven: {terms}"]
        for title, groups in (("trainable", self.trainable), ("frozen", self.frozen)):
            parts = ", ".join(f"{name} {count:,}" for name, count in groups.items())
            lines.append(f"  {title:<9} {sum(groups.values()):>13,}  {parts}".rstrip())
        if self.starts_at_zero:
            lines.append(f"  starts at zero: {', '.join(grouped(self.starts_at_zero))}")
        if self.unreached:
            lines.append(f"  no gradient from this batch (allowed): {some(self.unreached)}")
        ratios = ", ".join(f"{name} {ratio:.1g}" for name, ratio in self.ratios.items())
        return "\n".join([*lines, f"  gradient norm / weight norm: {ratios}"])


def prove_gradients_before(
    model: torch.nn.Module,
    loss_fn: Callable,
    batches: list,
    *,
    prepare: Callable = lambda model, batches: None,
    may_be_unreached: Callable[[str], bool] = lambda name: False,
    claims: Mapping[str, Callable[[str], bool]] = MappingProxyType({}),
    trains: Callable[[str], bool] = lambda name: True,
    ties=TIES,
) -> GradientReport:
    """Prove on a copy of `model` that every trainable parameter gets a gradient, and no frozen one.

    Args:
        model: it, its gradients and the random states are left unchanged.
        loss_fn: `loss_fn(model, batch)` returns the loss of one micro-batch, or a dictionary of its terms,
            the main one first. Each term must train something. It must use the model that it is given.
        batches: the micro-batches of one step. They are run one at a time, so the proof needs no more memory
            for activations than training. Each one with a label must train the model.
        prepare: `prepare(model, batches)` is called before each pass over the micro-batches: one pass, and
            one more for each layer of zeros upon zeros.
        may_be_unreached: excuses parameters, by name, that a batch may miss.
        claims: for each term, which parameters it must reach. Without a claim, a balance loss that became a
            constant would go unnoticed: the router still gets the gradient of the language-model loss.
        trains: which parameters should be trainable, by name.
        ties: groups of ends of names that one parameter may have.

    With several processes a parameter counts as reached if one of them reaches it, since gradients are
    summed. Raises `UserError` naming the parameters, the modules they belong to and the likely cause.
    """
    check_model(model, batches, trains, ties)
    before = random_state()
    try:
        trial = Trial(model, loss_fn, batches, prepare)
        with torch.enable_grad():
            starts_at_zero = trial.wake_zeros()
            found = trial.measure()
            reached = set().union(*found.reached.values())
            missed = [name for name in trial.trainable if name not in reached]
            if cut_off := [name for name in missed if not may_be_unreached(name)]:
                trial.explain(cut_off)
            dead, idle = trial.dead_slices(found)
    finally:
        set_random_state(before)
    for term, names in found.reached.items():
        if not names:
            raise UserError(f"{term} reaches no trainable parameter: is it multiplied by zero?")
        claimed = filter(claims.get(term, lambda name: False), trial.trainable)
        if lost := [name for name in claimed if name not in names and not may_be_unreached(name)]:
            raise UserError(f"{term} does not reach what it should train: {describe(model, lost)}")
    if lapsed := [name for name in found.lapsed if not may_be_unreached(name)]:
        raise UserError(
            f"trained by some labelled micro-batches and not by others: {describe(model, lapsed)}; is the "
            "loss of a micro-batch detached, masked or multiplied by zero?"
        )
    if dead:
        raise UserError(
            f"part of a matrix is cut off from the loss, so never trained: {some(dead)}; is a head, a "
            "channel or a slice detached, overwritten or multiplied by zero in the forward?"
        )
    weights = {name: p.norm().item() for name, p in trial.trainable.items() if name in reached}
    ratios = {name: found.norms[name] / max(norm, 1e-30) for name, norm in weights.items()}
    usual = sorted(ratios.values())[3 * len(ratios) // 4]  # so that up to three quarters may be faint
    if faint := [name for name in ratios if ratios[name] < FAINT * usual]:
        worst = min(ratios[name] for name in faint) / usual
        raise UserError(
            f"gradient / weight is only {worst:.0e} of the usual: {describe(model, faint)}; "
            "is its output multiplied by a tiny number?"
        )
    parameters = dict(model.named_parameters())
    return GradientReport(
        trainable=count_by_group({name: parameters[name] for name in trial.trainable}),
        frozen=count_by_group({name: p for name, p in parameters.items() if name not in trial.trainable}),
        starts_at_zero=starts_at_zero,
        reached_by={term: len(names) for term, names in found.reached.items()},
        unreached=missed + idle,
        ratios=middle_by_group(ratios),
    )


def group_of(name: str) -> str:
    """`layers.3.self_attn.q_proj.weight` -> `layers.*.self_attn`: the part that a parameter belongs to."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    if "*" in parts:
        return ".".join(parts[: parts.index("*") + 2])
    return ".".join(parts[:-1]) or name


def count_by_group(parameters: dict[str, torch.Tensor]) -> dict[str, int]:
    """Count the parameters of each group, in the order of the model."""
    counts = {}
    for name, parameter in parameters.items():
        counts[group_of(name)] = counts.get(group_of(name), 0) + parameter.numel()
    return counts


def middle_by_group(ratios: dict[str, float]) -> dict[str, float]:
    """The median ratio of each group."""
    groups = {}
    for name, ratio in ratios.items():
        groups.setdefault(group_of(name), []).append(ratio)
    return {group: median(values) for group, values in groups.items()}


def grouped(names: list[str]) -> list[str]:
    """The names with layer numbers replaced by stars, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
