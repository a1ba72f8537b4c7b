"""Dialogues as ids -> rows -> batches. A row holds several dialogues, which do not attend to each other.

    dialogues    a b c d        e f g          T = 8, targets in capitals: a b C D, e F G
    input_ids    a b c e f . . .               the last token of a dialogue is a label only
    labels       - C D F G - - -               the shift happens here and nowhere else; - is -100
    document_ids 0 0 0 1 1 -1-1-1              tokens attend within one document only
    position_ids 0 1 2 0 1 0 0 0               each dialogue begins at position 0, as at inference
    padding_mask 1 1 1 1 1 0 0 0

Packing is best fit: each dialogue, in random order, goes into the fullest row that still has room for it.
Dialogues of 15 to 120 ids fill 98 % of rows of 256; one per row would fill a quarter. Training on
packed rows equals training with one dialogue per row (tested).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from load_data.chat.chat_data import Sample, Samples
from load_data.loader import IGNORED, TokenLoader, eval_batches


class DialogueRows:
    """Arrange samples in rows, and turn rows into tensors. A row is a list of indices of samples."""

    def __init__(self, samples: Sequence[Sample], sequence_length: int, packing: bool, pad_id: int):
        """Raises `ValueError` if there are no samples, or one does not fit into a row."""
        self.lengths = np.array([len(sample.ids) - 1 for sample in samples])
        if not samples or self.lengths.max() > sequence_length:
            raise ValueError(f"there must be samples, of at most {sequence_length + 1} ids")
        self.sequence_length, self.packing, self.pad_id = sequence_length, packing, pad_id
        if not isinstance(samples, Samples):  # `Samples` stay on disk
            samples = Samples(*map(np.concatenate, zip(*samples)), self.lengths + 1)
        self.samples = samples

    def arrange(self, order: Iterable[int]) -> list[list[int]]:
        """Return rows of the samples `order`."""
        if not self.packing:
            return [[one] for one in order]
        order = np.asarray(order)
        rows = pack_rows(self.lengths[order].tolist(), self.sequence_length)
        order = order.tolist()
        return [[order[place] for place in row] for row in rows]

    def batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return the tensors listed at the head of this file, (B, T) each: T is `sequence_length`, or without
        packing the longest of these rows. All samples are copied at once."""
        counts = np.array([len(row) for row in rows])
        samples = np.concatenate(rows)
        lengths = self.lengths[samples]
        begins = np.cumsum(lengths) - lengths  # of each sample, as if all were in one long row
        first = np.cumsum(counts) - counts  # the first sample of each row
        width = self.sequence_length if self.packing else int(lengths.max())
        begins_in_row = begins - np.repeat(begins[first], counts)
        places = np.arange(lengths.sum()) - np.repeat(begins, lengths)  # positions in the dialogue
        columns = places + np.repeat(begins_in_row, lengths)
        lines = np.repeat(np.repeat(np.arange(len(rows)), counts), lengths)
        source = places + np.repeat(self.samples.bounds[samples], lengths)
        documents = np.arange(len(samples)) - np.repeat(first, counts)
        ids, targets = self.samples.ids, self.samples.targets
        labels = np.where(targets[source + 1], ids[source + 1].astype(np.int64), IGNORED)

        def filled(values, fill):
            table = np.full((len(rows), width), fill, dtype=np.int64)
            table[lines, columns] = values
            return torch.from_numpy(table)

        return {
            "input_ids": filled(ids[source], self.pad_id),
            "labels": filled(labels, IGNORED),
            "document_ids": filled(np.repeat(documents, lengths), -1),
            "position_ids": filled(places, 0),
            "padding_mask": filled(1, 0).bool(),
        }


class ChatLoader(TokenLoader):
    """Endless training batches of dialogues.

    An epoch visits every sample once, in an order drawn from (seed, epoch), and packs rows in that order.
    Steps, their division and resuming work as in `TokenLoader`; `starts` holds rows.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        sequence_length: int,
        batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        packing: bool = True,
        *,
        pad_id: int,
    ):
        self.rows = DialogueRows(samples, sequence_length, packing, pad_id)
        self.sequence_length = self.length = sequence_length
        self.batch_size, self.seed, self.doublings = batch_size, seed, 0
        self.accumulation_steps, self.rank, self.world_size = accumulation_steps, rank, world_size
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch, pack it, and move to its beginning."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows.lengths))
        self.starts = np.fromiter(self.rows.arrange(order), dtype=object)
        self.epoch, self.index_in_epoch = epoch, 0

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the tensors of some rows, see `DialogueRows.batch`."""
        return self.rows.batch(list(rows))


def pack_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack items of `lengths`, each from 1 to `capacity`, into rows of at most `capacity`: best fit.

    Bit r of `rooms` is set if some row has room for exactly r more. The lowest set bit from an item's length
    upwards is the fullest row that can take it, found in one step for any number of rows.
    """
    rows, rooms = [], 0
    with_room = [[] for _ in range(capacity + 1)]
    for item, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(item)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def count_eval_rows(samples: Sequence[Sample], sequence_length: int, packing: bool = True) -> int:
    """Return the number of rows that `eval_chat_batches` makes of all samples."""
    lengths = [len(sample.ids) - 1 for sample in samples]
    return len(pack_rows(lengths, sequence_length)) if packing else len(samples)


def eval_chat_batches(
    samples: Sequence[Sample],
    sequence_length: int,
    batch_size: int,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    packing: bool = True,
    *,
    pad_id: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches with every sample once, in order; with `max_batches` (per rank), as many rows as that
    allows, evenly spread."""
    table = DialogueRows(samples, sequence_length, packing, pad_id)
    rows = table.arrange(range(len(samples)))
    for chosen in eval_batches(len(rows), batch_size, max_batches, rank, world_size):
        yield table.batch([rows[one] for one in chosen])
