"""Dialogues as ids -> rows -> batches. A row holds several dialogues, which do not see each other.

    dialogues    a b c d        e f g          T = 8, targets in capitals: a b C D, e F G
    input_ids    a b c e f . . .               the last token of a dialogue is a label only
    labels       - C D F G - - -               the shift happens here and nowhere else; - is -100
    document_ids 0 0 0 1 1 -1-1-1              who may see whom
    position_ids 0 1 2 0 1 0 0 0               each dialogue begins at place 0, as it will at inference
    padding_mask 1 1 1 1 1 0 0 0

Packing is best fit: each dialogue, in random order, goes into the fullest row that still has room for it.
Lengths of 15 to 120 fill rows of 256 to 98 %; one dialogue in each would fill them to a quarter. Training on
packed rows equals training with one dialogue in a row; a test holds it to that.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from load_data.chat.chat_data import Sample
from load_data.loader import IGNORED, TokenLoader


class DialogueRows:
    """Arranges samples in rows, and makes tensors of rows. A row is a list of the numbers of its samples."""

    def __init__(self, samples: list[Sample], sequence_length: int, packing: bool, pad_id: int):
        """Raises `ValueError` for no samples, and for one that does not fit into a row."""
        self.lengths = np.array([len(sample.ids) - 1 for sample in samples])
        if not samples or self.lengths.max() > sequence_length:
            raise ValueError(f"there must be samples, of at most {sequence_length + 1} ids")
        self.sequence_length, self.packing, self.pad_id = sequence_length, packing, pad_id
        self.offsets = np.cumsum(self.lengths) - self.lengths  # where each sample begins in the next two
        self.inputs = np.concatenate([sample.ids[:-1] for sample in samples])
        following = np.concatenate([sample.ids[1:] for sample in samples])
        is_target = np.concatenate([sample.targets[1:] for sample in samples])
        self.labels = np.where(is_target, following, IGNORED)

    def arrange(self, order: Iterable[int]) -> list[list[int]]:
        """Rows of the samples `order`."""
        if not self.packing:
            return [[one] for one in order]
        order = np.asarray(order)
        rows = pack_rows(self.lengths[order].tolist(), self.sequence_length)
        order = order.tolist()
        return [[order[place] for place in row] for row in rows]

    def batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """The tensors that the head of this file shows, (B, T) each: T is `sequence_length`, or without
        packing the longest of these rows. The text of every sample is copied in one go."""
        counts = np.array([len(row) for row in rows])
        samples = np.concatenate(rows)
        lengths = self.lengths[samples]
        begins = np.cumsum(lengths) - lengths  # of each sample, if all were in one long row
        first = np.cumsum(counts) - counts  # of each row: its first sample
        width = self.sequence_length if self.packing else int(lengths.max())
        begins_in_row = begins - np.repeat(begins[first], counts)
        places = np.arange(lengths.sum()) - np.repeat(begins, lengths)  # in its dialogue
        columns = places + np.repeat(begins_in_row, lengths)
        lines = np.repeat(np.repeat(np.arange(len(rows)), counts), lengths)
        source = places + np.repeat(self.offsets[samples], lengths)
        documents = np.arange(len(samples)) - np.repeat(first, counts)

        def filled(values, fill):
            table = np.full((len(rows), width), fill, dtype=np.int64)
            table[lines, columns] = values
            return torch.from_numpy(table)

        return {
            "input_ids": filled(self.inputs[source], self.pad_id),
            "labels": filled(self.labels[source], IGNORED),
            "document_ids": filled(np.repeat(documents, lengths), -1),
            "position_ids": filled(places, 0),
            "padding_mask": filled(1, 0).bool(),
        }


class ChatLoader(TokenLoader):
    """Endless training batches of dialogues.

    An epoch visits every sample once, in an order drawn from (seed, epoch), and rows are packed in that
    order. Steps, their division and resuming are those of `TokenLoader`; `starts` holds rows.
    """

    def __init__(
        self,
        samples: list[Sample],
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
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.accumulation_steps, self.rank, self.world_size = accumulation_steps, rank, world_size
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch, pack it, and stand at its beginning."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows.lengths))
        self.starts = np.fromiter(self.rows.arrange(order), dtype=object)
        self.epoch, self.index_in_epoch = epoch, 0

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the next step, see `DialogueRows.batch`."""
        rows = self.take(self.batch_size * self.accumulation_steps * self.world_size)
        shares = rows.reshape(self.accumulation_steps, self.world_size, self.batch_size)[:, self.rank]
        return [self.rows.batch(list(share)) for share in shares]


def pack_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Items of `lengths`, each from 1 to `capacity`, in rows of at most `capacity`: best fit.

    Bit r of `rooms` says whether some row has room for exactly r more; the lowest bit from an item's length
    on is the fullest row that can take it, found in one step for any number of rows.
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


def count_eval_rows(samples: list[Sample], sequence_length: int, packing: bool = True) -> int:
    """How many rows `eval_chat_batches` makes of all samples."""
    if not packing:
        return len(samples)
    return len(pack_rows([len(sample.ids) - 1 for sample in samples], sequence_length))


def eval_chat_batches(
    samples: list[Sample],
    sequence_length: int,
    batch_size: int,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    packing: bool = True,
    *,
    pad_id: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches with every sample once, in order; with `max_batches` (of each rank), as many rows as that
    allows, evenly spread."""
    table = DialogueRows(samples, sequence_length, packing, pad_id)
    rows = table.arrange(range(len(samples)))
    chosen = np.arange(len(rows))
    if max_batches is not None and max_batches * batch_size * world_size < len(rows):
        wanted = max_batches * batch_size * world_size
        chosen = np.arange(wanted) * len(rows) // wanted
    mine = chosen[rank::world_size]
    for first in range(0, len(mine), batch_size):
        yield table.batch([rows[one] for one in mine[first : first + batch_size]])
