"""Proof that a run will train: before it, one step's data is run forward and backward through a copy.

A model with half of its parameters cut off still learns something, and its loss curve looks like any other.
So before a run `prove_gradients_before` checks the model (`train/proof/model_check.py`) and its gradients
(`train/proof/trial.py`), and after the run `WeightWitness` (`train/proof/weight_witness.py`) compares every
weight with its first value.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from train.proof.model_check import check_model, describe, some
from train.proof.trial import Trial
from utils.device import random_state, set_random_state
from utils.errors import UserError

# A part whose gradient is so far below that of others is lost in fp32's rounding (6e-8) where it is added to
# the residual stream. In healthy models the weakest is above 1e-5.
FAINT = 1e-7


@dataclass
class GradientReport:
    """The findings of `prove_gradients_before`."""

    trainable: int  # parameters
    frozen: int
    starts_at_zero: list[str]
    reached_by: dict[str, int]  # for each loss term, how many tensors it trains
    idle: list[str]  # experts that no token chose
    ratios: dict[str, float]  # for each tensor, its gradient norm / weight norm

    def __str__(self) -> str:
        terms = ", ".join(f"{term} trains {count} tensors" for term, count in self.reached_by.items())
        low, high = min(self.ratios.values()), max(self.ratios.values())
        lines = [
            f"gradients proven: {terms}",
            f"  {self.trainable:,} parameters are trainable, {self.frozen:,} frozen; gradient norm / weight "
            f"norm is {low:.1g} to {high:.1g}",
        ]
        if self.starts_at_zero:  # layer numbers replaced by stars, each name once
            names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in self.starts_at_zero)
            lines.append(f"  starts at zero: {some(list(names))}")
        if self.idle:
            lines.append(f"  no gradient from this batch (allowed): {some(self.idle)}")
        return "\n".join(lines)


def prove_gradients_before(
    model: torch.nn.Module,
    loss_fn: Callable,
    batches: list,
    *,
    prepare: Callable = lambda model, batches: None,
    claims: Mapping[str, Callable[[str], bool]] | None = None,
    trains: Callable[[str], bool] = lambda name: True,
) -> GradientReport:
    """Prove on a copy of `model` that every trainable parameter gets a gradient, and no frozen one.

    Args:
        model: it, its gradients and the random states are left unchanged.
        loss_fn: `loss_fn(model, batch)` returns the loss of one micro-batch, or a dictionary of its terms,
            the main one first. Each term must train something.
        batches: the micro-batches of one step. They run one at a time, so the proof needs no more memory for
            activations than training. Each one with a label must train the model.
        prepare: `prepare(model, batches)` is called before each pass over the micro-batches.
        claims: for each term, which parameters it must reach. Without a claim, a balance loss that became a
            constant would go unnoticed: the router still gets the gradient of the language-model loss.
        trains: which parameters should be trainable, by name.

    With several processes a parameter counts as reached if one of them reaches it, since gradients are
    summed. Raises `UserError` naming the parameters, the modules they belong to and the likely cause.
    """
    check_model(model, batches, trains)
    before = random_state()
    try:
        trial = Trial(model, loss_fn, batches, prepare)
        with torch.enable_grad():
            starts_at_zero = trial.wake_zeros()
            trial.measure()
            trial.explain_missed()
            dead, idle = trial.dead_slices()
    finally:
        set_random_state(before)
    check_reached(model, trial, dead, claims or {})
    ratios = gradient_ratios(model, trial)
    trainable = sum(p.numel() for p in trial.trainable.values())
    return GradientReport(
        trainable=trainable,
        frozen=sum(p.numel() for p in model.parameters()) - trainable,
        starts_at_zero=starts_at_zero,
        reached_by={term: len(names) for term, names in trial.reached.items()},
        idle=idle,
        ratios=ratios,
    )


def check_reached(model: torch.nn.Module, trial: Trial, dead: list[str], claims: Mapping) -> None:
    """Raise `UserError` for a term, a micro-batch or a slice of a matrix that trains less than it should."""
    for term, names in trial.reached.items():
        if not names:
            raise UserError(f"{term} reaches no trainable parameter: is it multiplied by zero?")
        claimed = filter(claims.get(term, lambda name: False), trial.trainable)
        if lost := [name for name in claimed if name not in names]:
            raise UserError(f"{term} does not reach what it should train: {describe(model, lost)}")
    if trial.lapsed:
        raise UserError(
            f"trained by some labelled micro-batches and not by others: {describe(model, trial.lapsed)}; is "
            "the loss of a micro-batch detached, masked or multiplied by zero?"
        )
    if dead:
        raise UserError(
            f"part of a matrix is cut off from the loss, so never trained: {some(dead)}; is a head, a "
            "channel or a slice detached, overwritten or multiplied by zero in the forward?"
        )


def gradient_ratios(model: torch.nn.Module, trial: Trial) -> dict[str, float]:
    """Return gradient norm / weight norm of each tensor. Raises `UserError` where it is next to nothing."""
    ratios = {name: trial.norms[name] / max(p.norm().item(), 1e-30) for name, p in trial.trainable.items()}
    usual = sorted(ratios.values())[3 * len(ratios) // 4]  # so that up to three quarters may be faint
    if faint := [name for name in ratios if ratios[name] < FAINT * usual]:
        worst = min(ratios[name] for name in faint) / usual
        raise UserError(
            f"gradient / weight is only {worst:.0e} of the usual: {describe(model, faint)}; "
            "is its output multiplied by a tiny number?"
        )
    return ratios
