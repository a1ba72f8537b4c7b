"""Batches of items that are not windows of one long text: pairs of texts, each in a row of its own."""

from collections.abc import Sequence

import numpy as np
import torch

from load_data.loader import TokenLoader


class ItemLoader(TokenLoader):
    """Endless training batches of items; a subclass makes the tensors of some of them, `batch(indices)`.

    An epoch visits every item once, in an order drawn from (seed, epoch). Steps, their division and resuming
    work as in `TokenLoader`; `starts` holds indices.
    """

    def __init__(self, count: int, batch_size: int, accumulation_steps=1, rank=0, world_size=1, seed=0):
        self.count, self.batch_size, self.accumulation_steps = count, batch_size, accumulation_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.sequence_length = self.length = 1  # of an item, in the units of `starts`
        self.doublings = 0
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch and move to its beginning."""
        self.starts = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        self.epoch, self.index_in_epoch = epoch, 0


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of ids as one tensor (B, T) int64, filled up on the right to the longest, and the mask of
    what was there (B, T). T is at least 1."""
    lengths = np.array([len(row) for row in rows])
    there = np.arange(max(1, lengths.max())) < lengths[:, None]
    table = np.full(there.shape, fill, dtype=np.int64)
    table[there] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(table), torch.from_numpy(there)
