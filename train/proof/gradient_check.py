"""Proof that training will train: before the first step, one batch goes forth and back through a copy.

A model with half of its parameters cut off still learns something, and its loss curve looks like any other.
So before a run `prove_gradients_before` looks at the model (`train/proof/model_check.py`) and at its
gradients, and
after it `WeightWitness` (`train/proof/weight_witness.py`) compares every weight with what it was.

Zeros need care: a projection that starts at zero (LoRA's B, the last layer of each block under
`zero_init_residual`) passes no gradient to what lies before it on the very first step, and a healthy model
would look broken. So the copy plays the first steps: a tensor of zeros that gets a gradient is given small
random numbers, as the optimizer would move it, until no more of them wake up. What is then without gradient
stays so for ever, as a LoRA does whose A and B both start at zero.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from utils.device import random_state, set_random_state
from utils.distributed import sum_scalars
from utils.errors import UserError
from train.proof.model_check import TIES, check_model, describe, hidden_parts, some

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
    trains: Callable[[str], bool] = lambda name: True,
    ties=TIES,
) -> GradientReport:
    """Prove on a copy of `model` that every trainable parameter gets a gradient, and no frozen one.

    Args:
        model: it, its gradients and the random states are left as they were.
        loss_fn: `loss_fn(model, batches)` returns the loss, or a dictionary of its terms, each of which must
            train something. It must use the model that it is given. It is called once, and once more for
            each layer of zeros upon zeros.
        may_be_unreached: excuses parameters, by name, that a batch may miss.
        claims: says of a term which parameters it must reach: a balance loss that became a constant still
            leaves the router the gradient of the language-model loss, and would go unnoticed.
        trains: which parameters are meant to learn, by name.
        ties: groups of ends of names that one parameter may have.

    With several processes a parameter counts as reached if one of them reaches it, since they add up their
    gradients. Raises `UserError` naming the parameters, the modules they belong to and the likely cause.
    """
    check_model(model, batches, trains, ties)
    before = random_state()
    try:
        trial = Trial(model, loss_fn, batches)
        with torch.enable_grad():
            starts_at_zero = trial.wake_zeros()
            reached, idle = trial.reached_parameters()
            missed = [name for name in trial.trainable if name not in set().union(*reached.values())]
            if cut_off := [name for name in missed if not may_be_unreached(name)]:
                trial.explain(cut_off)
    finally:
        set_random_state(before)
    if idle_terms := [term for term, names in reached.items() if not names]:
        raise UserError(f"{idle_terms[0]} reaches no trainable parameter: is it multiplied by zero?")
    for term in reached.keys() & claims.keys():
        promised = [name for name in trial.trainable if claims[term](name) and name not in reached[term]]
        if promised:
            raise UserError(f"{term} does not reach what it should train: {describe(model, promised)}")
    parameters = dict(model.named_parameters())
    return GradientReport(
        trainable=count_by_group({name: parameters[name] for name in trial.trainable}),
        frozen=count_by_group({name: p for name, p in parameters.items() if name not in trial.trainable}),
        starts_at_zero=starts_at_zero,
        reached_by={term: len(names) for term, names in reached.items()},
        unreached=missed + idle,
    )


class Trial:
    """A copy of a model, on which the first steps are played."""

    def __init__(self, model: torch.nn.Module, loss_fn: Callable, batches: list):
        self.original, self.loss_fn, self.batches = model, loss_fn, batches
        self.model = copy.deepcopy(model)
        self.parameters = dict(self.model.named_parameters())
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.woken = set()  # names of zeros that were given numbers
        self.plain = {id(tensor): (where, tensor) for where, tensor in hidden_parts(self.model)}
        for _, tensor in self.plain.values():  # so that the graph shows whether it has a part in the loss
            if tensor.is_floating_point():
                tensor.requires_grad_()

    def wake_zeros(self) -> list[str]:
        """Give small random numbers to the zeros that get a gradient, and to those behind them, and so on;
        returns the names of all that start at zero."""
        generator = torch.Generator().manual_seed(0)  # its own, so that the global one is not disturbed
        start = zeros = [name for name, parameter in self.trainable.items() if not parameter.any()]
        while zeros:
            moving = self.with_gradient(zeros)
            if not moving:
                break
            self.fill(moving, generator)
            zeros = [name for name in zeros if name not in moving]
        return start

    def fill(self, names: list[str], generator: torch.Generator) -> None:
        """Small random numbers in place of zeros."""
        for name in names:
            noise = torch.randn(self.parameters[name].shape, generator=generator) * NOISE
            self.parameters[name].data.copy_(noise)
        self.woken |= set(names)

    def forward(self) -> dict[str, torch.Tensor]:
        """The terms of the loss, each with a graph that ends in parameters of the copy alone."""
        try:
            losses = self.loss_fn(self.model, self.batches)
        except RuntimeError as error:
            usual = next(iter(self.parameters.values())).device
            odd = [f"{where} on {t.device}" for where, t in self.plain.values() if t.device != usual]
            if not odd or not re.search("same device|expected device", str(error)):
                raise
            raise UserError(
                f"the forward meets two devices; plain attributes do not follow the model to {usual}: "
                f"{some(odd)}; use register_buffer"
            ) from error
        losses = losses if isinstance(losses, Mapping) else {"loss": losses}
        for term, loss in losses.items():
            if not isinstance(loss, torch.Tensor) or loss.grad_fn is None:
                raise UserError(  # requires_grad_(True) makes no graph either
                    f"{term} has no graph behind it, so it cannot train anything: was it computed under "
                    "no_grad(), detached, or turned into a number with .item()?"
                )
            if not torch.isfinite(loss).all():
                raise UserError(
                    f"{term} is {loss.item()} on the first batch: check the data and the initial weights"
                )
            self.check_leaves(term, loss)
        for name, parameter in self.parameters.items():
            if name not in self.woken and not torch.equal(parameter, self.original.get_parameter(name)):
                raise UserError(f"the forward itself changes {describe(self.model, [name])}: in place?")
        return losses

    def check_leaves(self, term: str, loss: torch.Tensor) -> None:
        """Whatever the graph of a term ends in must be a parameter of the copy."""
        owned = {id(parameter) for parameter in self.parameters.values()}
        originals = {id(parameter): name for name, parameter in self.original.named_parameters()}
        for leaf in leaves(loss):
            if id(leaf) in owned:
                continue
            if id(leaf) in self.plain:
                what = f"{self.plain[id(leaf)][0]}, neither parameter nor buffer: nn.Parameter forgotten?"
            elif id(leaf) in originals:
                what = f"{originals[id(leaf)]} of the original: does a closure or a hook hold on to it?"
            elif leaf.dim() == 0:
                what = "a number: requires_grad_() on a loss that lost its graph to a detach() or an .item()?"
            else:
                what = (
                    f"{tuple(leaf.shape)} that no module registers: from a closure, a global, a module made "
                    "in the forward, or another model? Is it computed from the model it is given?"
                )
            raise UserError(f"{term} depends on a tensor that is no parameter of the copy: {what}")

    def gradients(self, term: str, loss: torch.Tensor, names, keep_graph: bool = False):
        """The gradients that one term gives to these parameters, by name."""
        self.model.zero_grad(set_to_none=True)
        inputs = [self.parameters[name] for name in names if self.parameters[name].requires_grad]
        loss.backward(retain_graph=keep_graph, inputs=inputs)  # no work for others
        gradients = {name: self.parameters[name].grad for name in names}
        gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        if broken := [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]:
            raise UserError(f"{term} gives gradients that are not finite: {describe(self.model, broken)}")
        return gradients

    def reached_parameters(self) -> tuple[dict[str, set[str]], list[str]]:
        """For each loss term, the names of the parameters that it gives a finite, non-zero gradient; and of
        the stacks of experts, how many got nothing from any term (no token chose them)."""
        reached, used = {}, {}  # used: for each stack of experts, which of them got a gradient
        for term, loss in self.forward().items():
            gradients = self.gradients(term, loss, self.parameters, keep_graph=True)
            hits = agreed([name in gradients and bool(gradients[name].any()) for name in self.parameters])
            reached[term] = {name for name, hit in zip(self.parameters, hits) if hit}
            if woken := sorted(reached[term] - self.trainable.keys()):
                raise UserError(
                    f"frozen, yet it gets a gradient: {describe(self.model, woken)}; who set requires_grad?"
                )
            for name, gradient in gradients.items():
                if gradient.dim() == 3:
                    used[name] = used.get(name, False) | gradient.flatten(1).any(dim=1)
        idle = {name: len(flags) - int(flags.sum()) for name, flags in used.items() if flags.any()}
        return reached, [f"{count} of {len(used[name])} experts of {name}"
                         for name, count in idle.items() if count]  # fmt: skip

    def explain(self, cut_off: list[str]) -> None:
        """Raise the error: is it zeros that hold each other, frozen zeros, or a cut on the way? To find out,
        the former are filled, then the latter."""
        generator = torch.Generator().manual_seed(0)
        zeros = [name for name, parameter in self.parameters.items() if not parameter.any()]
        walls = [name for name in zeros if name not in self.trainable]
        walls.sort(key=lambda name: -self.parameters[name].dim())  # matrices before biases
        self.fill([name for name in zeros if name in self.trainable], generator)
        if woken := self.with_gradient(cut_off):
            raise UserError(
                f"A and B both start at zero: neither can move: {describe(self.model, woken)}; one factor of "
                "a product must start with random numbers"
            )
        self.fill(walls, generator)
        if woken := self.with_gradient(cut_off):
            raise UserError(
                f"no gradient will ever reach it: {describe(self.model, woken)}; what follows it is frozen "
                f"at zero: {describe(self.model, walls)}"
            )
        raise UserError(
            f"cut off from the loss, so never trained: {describe(self.model, cut_off)}; is it used in the "
            "forward, or is there a detach(), a no_grad(), an .item() or a multiplication by zero on the way?"
        )

    def with_gradient(self, names: list[str]) -> list[str]:
        """Those of `names` that the whole loss gives a gradient now."""
        gradients = self.gradients("loss", sum(self.forward().values()), names)
        hits = agreed([name in gradients and bool(gradients[name].any()) for name in names])
        return [name for name, hit in zip(names, hits) if hit]


def agreed(flags: list[bool]) -> list[bool]:
    """True where it is true in any process, so that all processes take the same way."""
    return [total > 0 for total in sum_scalars([float(flag) for flag in flags])]


def leaves(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that the graph of `loss` ends in: those that a backward would give a gradient."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        waiting += [before for before, _ in node.next_functions]


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
