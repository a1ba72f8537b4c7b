"""The seams of the engine: a stage names its data, its loss, what is trained, and what it saves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from config.schema import OptimConfig, RunConfig
from load_data.loader import IGNORED
from load_data.tokenization.tokenizer import Tokenizer
from utils import distributed
from utils.errors import UserError

SEARCHED = 100  # steps of data that are searched for a label before the first step

Batch = dict[str, torch.Tensor]


class Step(NamedTuple):
    """The data of one optimizer step."""

    micro_batches: list[Batch]  # of this process
    weight: float  # what the summed losses are divided by, over all processes; 0 skips the step
    tokens: int  # processed, over all processes
    numbers: dict[str, float] = {}  # of the source, for the log


class Source(Protocol):
    """The training data of a stage.

    `next_step` is called with the random generators seeded for the step, and may generate text with the
    models: a resumed run repeats it. `progress` is the share of the run that is over. `sample` returns data
    for the gradient proof and consumes none.
    """

    epoch: int
    epoch_progress: float  # epochs so far, as a fraction

    def next_step(self, models: dict[str, torch.nn.Module], progress: float) -> Step: ...
    def sample(self) -> Step: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Loss:
    """The loss of a stage, called once per micro-batch; the other methods may stay empty."""

    def __call__(self, model, batch: Batch, weight: float) -> tuple[dict, dict]:
        """Return (terms, measures), each divided by the `weight` of the whole step.

        The loss is the sum of the terms. Measures go to the log; one replaces the term of the same name.
        """
        raise NotImplementedError

    def claims(self) -> dict[str, Callable[[str], bool]]:
        """Return the parameters that each term must reach, by name, for the gradient proof."""
        return {}

    def before_step(self, model, micro_batches: list[Batch]) -> None:
        """Look at all micro-batches of a step before the first forward."""

    def after_step(self, lr_factor: float) -> dict[str, float]:
        """Finish a step; return more numbers for the log."""
        return {}


class Evaluation(Protocol):
    """Measures a model on held-out data: `val_loss` and other numbers for the log."""

    batches: int  # of a whole evaluation

    def __call__(self, model, max_batches: int | None) -> dict[str, float]: ...


@dataclass
class Stage:
    """Everything that the engine (train/engine/trainer.py) does not share between stages.

    Attributes:
        name, short: `pre_train`, `Pre`: the names of its log folder and of its checkpoints.
        model: the model to train; several are one `torch.nn.ModuleDict`, each with optimizers of its own.
        trains: the parameters that must be trainable, by name. The engine does not freeze; it checks.
        tokenizer: stored in every checkpoint; None if there is none.
        data_digest: identifies the training data; a resumed run must find the same.
        base: the record of the frozen base in an adapter's checkpoint (plain data: `digest`, `path`).
        own: names of the weights that checkpoints hold, those of an adapter for example; None for all.
        result: the part of a `ModuleDict` that checkpoints present as the model, under the names of its own;
            the others are kept for resuming only (the critic beside a policy).
        keep_best: a metric; keep the weights with its highest value after an epoch, not the last weights.
        frozen: models that are used but not trained (a teacher, a reference policy), by name. The engine
            places them on the device and proves at the end that they have not changed.
        final_entries: returns, from the trained model and the settings, entries of the final checkpoint that
            replace those of the run, where the result is not what was trained (QAT).
        optim: optimizer settings of parts of a `ModuleDict`, by name, where they differ from `config.optim`.
    """

    name: str
    short: str
    model: torch.nn.Module
    source: Source
    loss: Loss
    evaluate: Evaluation
    tokenizer: Tokenizer | None
    data_digest: str
    trains: Callable[[str], bool] = lambda name: True
    base: dict | None = None
    own: frozenset[str] | None = None
    result: str | None = None
    keep_best: str | None = None
    frozen: dict[str, torch.nn.Module] = field(default_factory=dict)
    final_entries: Callable[[torch.nn.Module, RunConfig], dict] = lambda model, config: {}
    optim: dict[str, OptimConfig] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, torch.nn.Module]:
        """The models to train, by name."""
        return dict(self.model) if isinstance(self.model, torch.nn.ModuleDict) else {"model": self.model}

    @property
    def presented(self) -> torch.nn.Module:
        """The model that checkpoints present as the result."""
        return self.model[self.result] if self.result else self.model


def within(part: str, claim: Callable[[str], bool]) -> Callable[[str], bool]:
    """Return a claim on the parameters of one part of a `ModuleDict`; `claim` knows their own names."""
    return lambda name: name.startswith(f"{part}.") and claim(name.removeprefix(f"{part}."))


class LoaderSource:
    """A `Source` that reads a loader of labelled tokens (load_data/loader.py, load_data/chat/)."""

    epoch = property(lambda self: self.loader.epoch)
    epoch_progress = property(lambda self: self.loader.epoch_progress)

    def __init__(self, loader):
        self.loader = loader
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def next_step(self, models=None, progress: float = 0.0) -> Step:
        """Return the next micro-batches, weighted by their supervised tokens."""
        micro_batches = self.loader.next_step(progress)
        labels = [batch["labels"] for batch in micro_batches]
        counts = [sum((part != IGNORED).sum() for part in labels), sum(part.numel() for part in labels)]
        weight, tokens = distributed.sum_scalars(counts)
        return Step(micro_batches, weight, int(tokens))

    def sample(self) -> Step:
        """Return the first of the coming steps that has a label, without advancing."""
        state = self.state_dict()
        steps = (self.next_step() for _ in range(SEARCHED))
        found = next((step for step in steps if step.weight), None)
        self.load_state_dict(state)
        if found is None:
            raise UserError(f"no label in the first {SEARCHED} steps of data: nothing to learn from")
        return found
