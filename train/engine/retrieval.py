"""Evaluation of an embedding model: the rank of the right document among all held-out ones.

    val_mrr         the mean of 1 / rank of the right document
    val_recall1     the share of queries whose right document comes first; val_recall10: among the first ten
    val_loss        InfoNCE with all held-out pairs as one batch

With a bound on batches there are fewer queries and fewer documents, which is easier: compare only results
with equal bounds.
"""

from collections.abc import Callable

import torch

from model.embedder import Embedder
from modules.alignment.contrastive import cosine_scores
from train.engine.contrastive_loss import ContrastiveLoss, on, vectors_of
from utils import distributed


class RetrievalEvaluation:
    """`evaluation(model, max_batches)` -> the numbers above; None measures all held-out pairs.

    Args:
        held_out: max_batches -> the batches of this process, at most that many.
        pairs: the number of held-out pairs, over all processes.
    """

    def __init__(self, held_out: Callable, pairs: int, batch_size: int, loss: ContrastiveLoss, machine):
        self.held_out, self.loss, self.machine = held_out, loss, machine
        self.batches = -(-pairs // (batch_size * machine.world.size))  # of each process, rounded up

    def __call__(self, model: Embedder, max_batches: int | None) -> dict[str, float]:
        """Embed the batches of this process, and score those of all."""
        parts = []
        for batch in self.held_out(max_batches):
            batch = {key: value.to(self.machine.device) for key, value in batch.items()}
            parts.append(on(vectors_of(model, batch), "cpu"))
        parts = [part for parts in distributed.gather(parts) for part in parts]
        queries = torch.cat([part.queries for part in parts])
        right = torch.cat([part.documents[: len(part.queries)] for part in parts])
        wrong = torch.cat([part.documents[len(part.queries) :] for part in parts])
        scores = cosine_scores(queries, torch.cat([right, wrong]))
        loss = self.loss.losses(parts).mean().item()
        return {"val_loss": loss} | {f"val_{name}": value for name, value in measures(scores).items()}


def measures(scores: torch.Tensor) -> dict[str, float]:
    """Return `mrr`, `recall1` and `recall10` of scores (N, M), where document i answers query i."""
    ranks = ranks_of(scores)
    found = {"mrr": 1 / ranks, "recall1": ranks <= 1, "recall10": ranks <= 10}
    return {name: values.double().mean().item() for name, values in found.items()}


def ranks_of(scores: torch.Tensor) -> torch.Tensor:
    """Return the rank (N,) of the right document of each query, from 1. Of documents with equal scores, half
    are counted before it: a method that scores all alike must not come out first."""
    right = scores.diagonal()[:, None]
    equal = (scores == right).sum(1) - 1
    return 1 + (scores > right).sum(1) + equal.double() / 2
