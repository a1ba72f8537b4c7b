"""The trial of the gradient proof: a copy of the model on which the first steps are imitated.

Zeros need care: a projection that starts at zero (LoRA's B, the last layer of each block under
`zero_init_residual`) passes no gradient to what lies before it on the very first step, and a healthy model
would look broken. So the copy imitates the first steps: a tensor of zeros that gets a gradient is given small
random numbers, as if the optimizer had moved it, until no other tensor of zeros gets one. A tensor that is
still without gradient then stays so forever, such as a LoRA whose A and B both start at zero.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from load_data.loader import IGNORED
from train.proof.model_check import describe, hidden_parts, some
from utils.distributed import sum_scalars
from utils.errors import UserError

CONFIRMING = 4  # passes with other dropout
NOISE = 0.02  # standard deviation of the numbers that replace zeros in the copy
# A row per token, per expert of a router, or per distance between tokens.
TABLE = re.compile(r"(^|\.)(embed_tokens|lm_head|gate|relative_bias)\.\w+$")


class Trial:
    """A copy of a model, on which the first steps are played, and the gradients that it got."""

    def __init__(self, model: nn.Module, loss_fn: Callable, batches: list, prepare: Callable):
        self.original, self.loss_fn, self.batches, self.prepare = model, loss_fn, batches, prepare
        self.model = copy.deepcopy(model)
        self.parameters = dict(self.model.named_parameters())
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.woken = set()  # names of zeros that were given numbers
        self.generator = torch.Generator().manual_seed(0)  # its own, so that the global one is not disturbed
        self.plain = {id(tensor): (where, tensor) for where, tensor in hidden_parts(self.model)}
        for _, tensor in self.plain.values():  # so that the graph shows whether the loss depends on it
            if tensor.is_floating_point():
                tensor.requires_grad_()
        self.squares = {}  # term -> parameter -> squared gradient norm, summed over micro-batches
        self.alive = {  # for each dimension of a matrix, the largest gradient norm of each slice
            name: [p.new_zeros(size, dtype=torch.float32) for size in p.shape] if p.dim() > 1 else []
            for name, p in self.trainable.items()
        }
        self.steady = []  # per labelled micro-batch: (has many labels, names its main term reached)

    def wake_zeros(self) -> list[str]:
        """Give small random numbers to the zeros that get a gradient, and to those behind them, and so on;
        return the names of all that start at zero."""
        start = zeros = [name for name, parameter in self.trainable.items() if not parameter.any()]
        while moving := self.with_gradient(zeros):
            self.fill(moving)
            zeros = [name for name in zeros if name not in moving]
        return start

    def fill(self, names: list[str]) -> None:
        """Replace zeros by small random numbers."""
        for name in names:
            noise = torch.randn(self.parameters[name].shape, generator=self.generator) * NOISE
            self.parameters[name].data.copy_(noise)
        self.woken |= set(names)

    # --- forward and backward -------------------------------------------------------------------------

    def forward(self, batch) -> dict[str, torch.Tensor]:
        """Return the loss terms of one micro-batch, each with a graph that ends in parameters of the copy."""
        try:
            losses = self.loss_fn(self.model, batch)
        except RuntimeError as error:
            usual = next(iter(self.parameters.values())).device
            odd = [f"{where} on {t.device}" for where, t in self.plain.values() if t.device != usual]
            if not odd or not re.search("same device|expected device", str(error)):
                raise
            raise UserError(
                f"the forward uses two devices; plain attributes do not follow the model to {usual}: "
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
                raise UserError(f"{term} is {loss.item()} on the first batch: check data and initial weights")
            self.check_leaves(term, loss)
        return losses

    def check_leaves(self, term: str, loss: torch.Tensor) -> None:
        """Raise `UserError` if the graph of a term ends in anything but a parameter of the copy."""
        owned = {id(parameter) for parameter in self.parameters.values()}
        known = {id(parameter): f"{name} of the original: does a closure or a hook hold on to it?"
                 for name, parameter in self.original.named_parameters()}  # fmt: skip
        known |= {key: f"{where}, neither parameter nor buffer: nn.Parameter forgotten?"
                  for key, (where, _) in self.plain.items()}  # fmt: skip
        for leaf in leaves(loss):
            if id(leaf) not in owned:
                what = known.get(id(leaf)) or (
                    "a number: requires_grad_() on a loss that lost its graph to a detach() or an .item()?"
                    if leaf.dim() == 0
                    else f"{tuple(leaf.shape)} that no module registers: from a closure, a global, a module "
                    "made in the forward, or another model? Is it computed from the model it is given?"
                )
                raise UserError(f"{term} depends on a tensor that is no parameter of the copy: {what}")

    def check_unchanged(self) -> None:
        """Raise `UserError` if the forward wrote into a weight."""
        for name, parameter in self.parameters.items():
            if name not in self.woken and not torch.equal(parameter, self.original.get_parameter(name)):
                raise UserError(f"the forward itself changes {describe(self.model, [name])}: in place?")

    def gradient_norms(self, term: str, loss: torch.Tensor, names: Iterable[str]) -> dict[str, float]:
        """Run backward from one term; return the gradient norm of each of these parameters that has one."""
        self.model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        gradients = {name: self.parameters[name].grad for name in names}
        norms = {name: grad.norm().item() for name, grad in gradients.items() if grad is not None}
        if broken := [name for name, norm in norms.items() if not norm < float("inf")]:
            raise UserError(f"{term} gives gradients that are not finite: {describe(self.model, broken)}")
        return norms

    def with_gradient(self, names: list[str]) -> list[str]:
        """Return those of `names` that the whole loss gives a gradient now."""
        if not names:
            return []
        hit = set()
        self.prepare(self.model, self.batches)
        for batch in self.batches:
            norms = self.gradient_norms("loss", sum(self.forward(batch).values()), names)
            hit |= {name for name, norm in norms.items() if norm}
        self.check_unchanged()
        return agreed({name: name in hit for name in names})

    # --- findings -------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Run all micro-batches forward and backward, one at a time. Collect over all processes: the names
        that each term has `reached`, the gradient `norms`, and the names whose gradient has `lapsed`."""
        self.prepare(self.model, self.batches)
        for batch in self.batches:
            self.measure_one(batch)
        self.check_unchanged()
        self.model.zero_grad(set_to_none=True)
        names = list(self.parameters)
        squares = {
            term: dict(zip(names, sum_scalars([found.get(name, 0.0) for name in names]), strict=True))
            for term, found in self.squares.items()
        }
        self.norms = {name: sum(found[name] for found in squares.values()) ** 0.5 for name in names}
        self.reached = {term: {n for n, square in found.items() if square} for term, found in squares.items()}
        for term, reached in self.reached.items():
            if thawed := sorted(reached - self.trainable.keys()):
                raise UserError(
                    f"frozen, yet {term} gives it a gradient: {describe(self.model, thawed)}; does the "
                    "forward set requires_grad?"
                )
        union = set().union(*(reached for _, reached in self.steady))
        self.lapsed = agreed({name: name in union and any(name not in reached and (many or not reached)
                                                          for many, reached in self.steady)
                              for name in names})  # fmt: skip

    def measure_one(self, batch) -> None:
        """Measure one micro-batch; its graph is freed on return."""
        labelled, many = labels_in(batch)
        terms = self.forward(batch)
        for term, loss in terms.items():
            norms = self.gradient_norms(term, loss, self.parameters)
            if labelled and term == next(iter(terms)):
                self.steady.append((many, {name for name, norm in norms.items() if norm}))
            squares = self.squares.setdefault(term, {})
            for name, norm in norms.items():
                squares[name] = squares.get(name, 0.0) + norm**2
                for dim, largest in enumerate(self.alive.get(name, ())):
                    rest = [other for other in range(self.parameters[name].dim()) if other != dim]
                    grad = self.parameters[name].grad
                    slices = torch.linalg.vector_norm(grad, dim=rest, dtype=torch.float32)
                    torch.maximum(largest, slices, out=largest)

    def dead_slices(self) -> tuple[list[str], list[str]]:
        """Return rows and columns of matrices whose gradient is exactly zero, and experts without a token.

        Dropout may zero a column by chance, so a slice is dead only if `CONFIRMING` more passes agree."""
        dead, idle = self.without_gradient()
        confirmed = 0
        while dead and confirmed < CONFIRMING:
            before = dead
            self.measure()
            dead, idle = self.without_gradient()
            confirmed = confirmed + 1 if dead == before else 0
        return dead, idle

    def without_gradient(self) -> tuple[list[str], list[str]]:
        """Return the current result of `dead_slices`. Rows of tables may be idle."""
        dead, idle = [], []
        for name, dims in self.alive.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            table = isinstance(module, nn.Embedding) or TABLE.search(name)
            for dim, norms in enumerate(dims):
                count = len(norms) - len(agreed(dict(enumerate((norms > 0).tolist()))))
                if count and dim == 0 and len(dims) == 3:
                    idle.append(f"{count} of {len(norms)} experts of {name}")
                elif count and (dim or not table):
                    dead.append(f"{name} ({count} of {len(norms)} slices of dimension {dim})")
        return dead, idle

    def explain_missed(self) -> None:
        """Raise an error about parameters that no term reaches, with its cause: zeros that block each other,
        frozen zeros, or a cut in between. To find out, it fills trainable zeros, then frozen ones."""
        reached = set().union(*self.reached.values())
        cut_off = [name for name in self.trainable if name not in reached]
        if not cut_off:
            return
        zeros = [name for name, parameter in self.parameters.items() if not parameter.any()]
        zeros.sort(key=lambda name: -self.parameters[name].dim())  # matrices before biases
        walls = [name for name in zeros if name not in self.trainable]
        self.fill([name for name in zeros if name in self.trainable])
        if woken := self.with_gradient(cut_off):
            raise UserError(
                f"A and B both start at zero: neither can move: {describe(self.model, woken)}; one factor of "
                "a product must start with random numbers"
            )
        self.fill(walls)
        if woken := self.with_gradient(cut_off):
            raise UserError(
                f"no gradient will ever reach it: {describe(self.model, woken)}; what follows it is frozen "
                f"at zero: {describe(self.model, walls)}"
            )
        raise UserError(
            f"cut off from the loss, so never trained: {describe(self.model, cut_off)}; is it used in the "
            "forward, or is there a detach(), a no_grad(), an .item() or a multiplication by zero in between?"
        )


def labels_in(batch) -> tuple[bool, bool]:
    """Return whether a micro-batch has a label, and whether it has so many that some must see earlier tokens:
    the first token of a row attends to itself alone, which gives queries and keys no gradient."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None:
        return True, True
    count = int((labels != IGNORED).sum())
    return count > 0, count > len(labels)


def agreed(flags: dict) -> list:
    """Return the keys of what is True in any process, so that all processes decide alike."""
    totals = sum_scalars([float(flag) for flag in flags.values()])
    return [key for key, total in zip(flags, totals, strict=True) if total]


def leaves(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that the graph of `loss` ends in: those that backward would give a gradient."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
