"""InfoNCE over all pairs of a step, and the source of such steps.

Every query is scored against the documents of all micro-batches and processes, so the batch is one batch
however it is divided. The graph of so many texts may not fit into memory; GradCache (arXiv 2101.06983) keeps
that of one micro-batch at a time:

    1. before the step: embed everything without gradient, and gather the vectors of all processes
    2. the loss of all, and its gradient with respect to each vector; its graph holds the vectors alone
    3. each micro-batch: embed again, with gradient; backward from  sum(vectors * their gradients of 2)

By the chain rule this is the gradient of the whole batch. Both passes draw the same dropout. A step of a
single micro-batch in a single process is embedded once.
"""

from typing import NamedTuple

import torch

from config.objectives import EmbedConfig
from model.embedder import embed_by_length
from modules.alignment.contrastive import info_nce, same_texts
from train.engine.stage import Batch, LoaderSource, Loss, Step
from utils import distributed

NAMES = ("query", "document")


class Vectors(NamedTuple):
    """The vectors of one micro-batch, and the numbers that identify its texts."""

    queries: torch.Tensor  # (N, C)
    documents: torch.Tensor  # (M, C), the first N of them right
    keys: tuple  # of queries (N,), documents (M,) and the queries that these answer (M,)


class Cached(NamedTuple):
    """Results of the first pass for one micro-batch."""

    losses: torch.Tensor  # (N,)
    queries: torch.Tensor  # (N, C) gradients
    documents: torch.Tensor  # (M, C)


class EmbedSource(LoaderSource):
    """Steps whose weight is their number of queries."""

    def next_step(self, models=None, progress: float = 0.0) -> Step:
        """Return the next micro-batches of pairs."""
        micro_batches = self.loader.next_step(progress)
        queries = sum(len(batch["query_ids"]) for batch in micro_batches)
        tokens = sum(int(batch[f"{name}_mask"].sum()) for batch in micro_batches for name in NAMES)
        weight, tokens = distributed.sum_scalars([queries, tokens])
        return Step(micro_batches, weight, int(tokens))

    def sample(self) -> Step:
        """Return the coming step without advancing."""
        state = self.state_dict()
        step = self.next_step()
        self.load_state_dict(state)
        return step


class ContrastiveLoss(Loss):
    """The loss of an embedding model."""

    def __init__(self, settings: EmbedConfig, machine):
        self.settings, self.machine = settings, machine
        self.batches, self.cached = [], []

    def before_step(self, model, micro_batches: list[Batch]) -> None:
        """Run the first pass, unless the step is one micro-batch in one process."""
        self.batches, self.cached = micro_batches, []
        if len(micro_batches) == self.machine.world.size == 1:
            return
        devices = [self.machine.device] if self.machine.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.machine.autocast():
            own = [vectors_of(model, batch) for batch in micro_batches]
        rank, device = self.machine.world.rank, self.machine.device
        parts = [part for parts in distributed.gather([on(part, "cpu") for part in own]) for part in parts]
        with torch.enable_grad():
            parts = [on(part, device) for part in parts]
            vectors = [part[:2] for part in parts]
            for vector in (one for pair in vectors for one in pair):
                vector.requires_grad_()
            losses = self.losses(parts)
            losses.sum().backward()
        losses = losses.detach().split([len(part.queries) for part in parts])
        cached = [Cached(loss, *(one.grad for one in pair)) for loss, pair in zip(losses, vectors)]
        self.cached = cached[rank * len(own) : (rank + 1) * len(own)]

    def __call__(self, model, batch: Batch, weight: float) -> tuple[dict, dict]:
        """Return the share of one micro-batch in the mean over all queries of the step."""
        part = vectors_of(model, batch)
        right = (part.queries * part.documents[: len(part.queries)]).sum(-1).detach()
        measures = {"cos": right.sum() / weight}  # of a query and its document
        if not self.cached:
            return {"nce": self.losses([part]).sum() / weight}, measures
        cached = next(one for one, known in zip(self.cached, self.batches) if known is batch)
        slope = (part.queries * cached.queries).sum() + (part.documents * cached.documents).sum()
        share = slope - slope.detach() + cached.losses.sum()  # the loss, with the gradient of the slope
        return {"nce": share / weight}, measures

    def losses(self, parts: list[Vectors]) -> torch.Tensor:
        """Return the loss of every query of these micro-batches, scored against all their documents."""
        starts = torch.tensor([0, *(len(part.documents) for part in parts)]).cumsum(0).tolist()
        places = [torch.arange(len(part.queries)) + start for part, start in zip(parts, starts)]
        queries, documents = (torch.cat([part[n] for part in parts]) for n in (0, 1))
        places = torch.cat(places).to(queries.device)
        keys = [torch.cat(kind) for kind in zip(*(part.keys for part in parts))]
        excluded = same_texts(*keys, places)
        widths = self.settings.matryoshka or ()
        return info_nce(queries, documents, places, self.settings.temperature, excluded, widths)


def vectors_of(model, batch: Batch) -> Vectors:
    """Embed the texts of a micro-batch."""
    vectors = [embed_by_length(model, batch[f"{name}_ids"], batch[f"{name}_mask"]) for name in NAMES]
    return Vectors(*vectors, tuple(batch[f"{name}_keys"] for name in (*NAMES, "owner")))


def on(part: Vectors, device) -> Vectors:
    """Return copies of the vectors of a micro-batch on `device`."""
    copies = (vectors.detach().to(device, copy=True) for vectors in part[:2])
    return Vectors(*copies, tuple(keys.to(device) for keys in part.keys))
