"""Cut a row of token ids into batches of windows, in an order independent of how a step is divided.

The shift happens here and nowhere else: `labels[t]` is the token that follows `input_ids[t]`.
"""

from collections.abc import Iterator

import numpy as np
import torch

from utils.errors import UserError

IGNORED = -100  # a label that the loss ignores


class TokenLoader:
    """Endless training batches from a row of tokens.

    An epoch visits non-overlapping windows of `sequence_length`, in an order drawn from (seed, epoch). They
    start at an offset drawn for each epoch, so that window boundaries vary. A step takes the next
    `batch_size * accumulation_steps * world_size` windows, however that product is factored.

    With `start_length`, windows begin short (`sequence_length`, halved while that leaves at least
    `start_length`) and double during the run; each new length starts a new epoch. A step has the same number
    of tokens throughout, in more rows while they are short. Short rows cost less attention and come from more
    places in the text, which helps at first (arXiv 2108.06084).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_length: int | None = None,
    ):
        """`tokens`: (N,) ids. Raises `UserError` if there are not enough for one window."""
        if len(tokens) < sequence_length + 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens, too few for data.sequence_length="
                f"{sequence_length}: set it to {max(2, len(tokens) - 1)} or less, or give more text"
            )
        self.tokens, self.sequence_length, self.batch_size = tokens, sequence_length, batch_size
        self.accumulation_steps, self.rank, self.world_size = accumulation_steps, rank, world_size
        self.seed = seed
        self.doublings = 0
        while start_length and sequence_length >> self.doublings >= 2 * start_length:
            self.doublings += 1
        self.length = sequence_length >> self.doublings
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch's windows, of the current length, and move to its beginning."""
        rng = np.random.default_rng((self.seed, epoch))
        length = self.length
        offset = rng.integers(min(length, len(self.tokens) - length))
        windows = (len(self.tokens) - 1 - offset) // length
        self.starts = offset + length * rng.permutation(windows)
        self.epoch, self.index_in_epoch = epoch, 0

    def take(self, count: int) -> np.ndarray:
        """Return the starts (count,) of the next windows, continuing into the next epoch if necessary."""
        parts = []
        while count:
            if self.index_in_epoch == len(self.starts):
                self.start_epoch(self.epoch + 1)
            part = self.starts[self.index_in_epoch : self.index_in_epoch + count]
            self.index_in_epoch += len(part)
            count -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def next_step(self, progress: float = 0.0) -> list[dict[str, torch.Tensor]]:
        """Return this rank's micro-batches of the next step: `input_ids` and `labels`, (B, T) int64 each.

        `progress`, the share of the run that is over, decides the length T of the rows."""
        share = min(int(progress * (self.doublings + 1)), self.doublings)  # each length gets an equal share
        length = self.sequence_length >> self.doublings - share
        if length != self.length:
            self.length = length
            self.start_epoch(self.epoch + 1)
        rows = self.batch_size * (self.sequence_length // length)
        items = self.take(rows * self.accumulation_steps * self.world_size)
        shares = items.reshape(self.accumulation_steps, self.world_size, rows)[:, self.rank]
        return [self.batch(share) for share in shares]

    def batch(self, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the windows that begin at `starts` (B,), with the tokens that follow as labels."""
        rows = self.tokens[starts[:, None] + np.arange(self.length + 1)]  # (B, T + 1)
        rows = torch.from_numpy(rows.astype(np.int64))
        return {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}

    @property
    def epoch_progress(self) -> float:
        """Epochs seen, as a fraction."""
        return self.epoch + self.index_in_epoch / len(self.starts)

    def state_dict(self) -> dict[str, int]:
        """Return the loader's position; the order follows from settings that a resumed run shares."""
        return {"epoch": self.epoch, "index_in_epoch": self.index_in_epoch, "length": self.length}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Move to the position in `state`; older states have a single length."""
        self.length = state.get("length", self.sequence_length)
        self.start_epoch(state["epoch"])
        self.index_in_epoch = state["index_in_epoch"]


def eval_batches(
    count: int, batch_size: int, max_batches: int | None, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """Yield the indices of each batch of this rank: all `count` in order, or with `max_batches` (per rank) as
    many as that allows, evenly spread."""
    wanted = min(count, (max_batches or count) * batch_size * world_size)
    mine = (np.arange(wanted) * count // wanted)[rank::world_size]
    for first in range(0, len(mine), batch_size):
        yield mine[first : first + batch_size]


def eval_windows(
    tokens: np.ndarray,
    sequence_length: int,
    batch_size: int,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches that predict every token of `tokens` once, except the very first; with `max_batches` (per
    rank), as many windows as that allows, evenly spread. A short last window is padded with labels of -100.
    """
    count = -(-(len(tokens) - 1) // sequence_length)  # rounded up
    for chosen in eval_batches(count, batch_size, max_batches, rank, world_size):
        positions = chosen[:, None] * sequence_length + np.arange(sequence_length + 1)  # (B, T + 1)
        rows = torch.from_numpy(tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64))
        labels = rows[:, 1:].masked_fill(torch.from_numpy(positions[:, 1:] >= len(tokens)), IGNORED)
        yield {"input_ids": rows[:, :-1].contiguous(), "labels": labels}
