"""Pairs -> batches of queries and documents.

    query_ids, query_mask          (N, T) each, padded on the right to the longest
    document_ids, document_mask    (M, T): the right document of each query, then those that are wrong
    query_keys (N,), document_keys (M,), owner_keys (M,)    see modules/alignment/contrastive.py

How a step is divided does not change which pairs are in it, see `TokenLoader`.
"""

from collections.abc import Iterator

import numpy as np
import torch

from load_data.embed_data import EncodedPairs
from load_data.items import ItemLoader, padded
from load_data.loader import eval_batches

NO_OWNER = -1  # of a wrong document; keys are not negative


class EmbedLoader(ItemLoader):
    """Endless training batches of pairs. `steps`: batch size, accumulation steps, rank, world size, seed."""

    def __init__(self, pairs: EncodedPairs, *steps: int, pad_id: int):
        self.pairs, self.pad_id = pairs, pad_id
        super().__init__(len(pairs.queries), *steps)

    def batch(self, chosen: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the tensors of some pairs."""
        return pair_batch(self.pairs, chosen, self.pad_id)


def pair_batch(pairs: EncodedPairs, chosen: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """Return the tensors listed at the head of this file."""
    queries, documents, first = pairs
    right = first[chosen]
    wrong = [one for index in chosen for one in range(first[index] + 1, first[index + 1])]
    places = np.concatenate([right, np.array(wrong, dtype=right.dtype)])
    batch = {}
    for name, texts, rows in (("query", queries, chosen), ("document", documents, places)):
        batch[f"{name}_ids"], batch[f"{name}_mask"] = padded([texts[row] for row in rows], pad_id)
        batch[f"{name}_keys"] = torch.from_numpy(texts.keys[rows])
    no_owner = torch.full((len(wrong),), NO_OWNER)
    batch["owner_keys"] = torch.cat([batch["query_keys"], no_owner])
    return batch


def eval_pairs(
    pairs: EncodedPairs, batch_size: int, max_batches: int | None, rank: int, world_size: int, pad_id: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches with every pair once; with `max_batches` (per rank), as many as that allows, evenly
    spread."""
    for chosen in eval_batches(len(pairs.queries), batch_size, max_batches, rank, world_size):
        yield pair_batch(pairs, chosen, pad_id)
