"""Pairs of answers to one prompt, of which one is preferred: records -> ids -> rows -> batches.

    prompt p, answers c (chosen) and r (rejected)    row 2i      p c     c and r end in <|im_end|>, and are
                                                     row 2i + 1  p r     the only labels of their rows

Both rows of a pair begin with the same ids. Answers are never cut: a pair with an answer of more than three
quarters of a row is left out. A prompt that is too long for the longer answer loses its oldest turns and then
its beginning, in both rows alike.

A row goes one id beyond its answer, the line break that follows an answer in a dialogue. It is no label, and
makes the last token of the answer an input: there a reward model reads its score.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config.schema import DataConfig
from load_data.chat.chat_data import Sample, Samples, checked_turns, chosen_files, map_samples, samples_digest
from load_data.chat.chat_loader import ChatLoader, DialogueRows
from load_data.chat.chat_template import ChatTemplate, Messages, cut_turn, fit_turns
from load_data.chat.records import as_pair, message, split_key
from load_data.corpora.documents import read_records
from load_data.corpora.reserved import unit_hash
from load_data.corpora.sources import TRAIN, VAL, limited
from load_data.loader import eval_batches
from load_data.tokenization.tokenizer import Tokenizer
from utils.errors import UserError

Batches = Iterator[dict[str, torch.Tensor]]


class Pair(NamedTuple):
    """The ids of a prompt, up to where the assistant begins to write, and of two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class PairData:
    """Pairs as rows, mapped from disk: rows 2i and 2i + 1 are pair i."""

    template: ChatTemplate
    train: Samples
    val: Samples
    summary: list[str]  # lines to print
    digest: str  # identifies all ids, their order, and which are labels

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the template."""
        return self.template.tokenizer

    def dialogues(self, side: str) -> Iterator[Messages]:
        """Yield the dialogues to score: none, since the better of two answers need not be the only one."""
        yield from ()


def fit_pair(template: ChatTemplate, prompt: Messages, answers: list[list[int]], room: int) -> Pair | None:
    """Return a pair whose rows have at most `room` ids and their line break; None if it does not fit."""
    free = room - max(map(len, answers))
    if free < room // 4:
        return None
    prompt = fit_turns(template, prompt, free)
    ids = template.prompt(prompt)
    ids = ids if len(ids) <= free else cut_turn(template, prompt, free)[0]
    return Pair(ids, *answers) if len(ids) <= free else None


def file_pairs(
    data: DataConfig, template: ChatTemplate, skipped: list[str]
) -> Iterator[tuple[str, Pair | None]]:
    """Yield every pair of the files in `data.paths` with its side, None if it is too long. The errors of bad
    records are added to `skipped`."""

    def parse(record: dict, where: str):
        prompt, *answers = as_pair(record, where)
        checked_turns({"messages": [*prompt, message("assistant", answers[0])]}, where)  # their order
        held_out = unit_hash(split_key(prompt, data.same_question)) < data.val_fraction
        ids = [[*template.content("assistant", text), template.end_of_turn[0]] for text in answers]
        return (VAL if held_out else TRAIN), fit_pair(template, prompt, ids, data.sequence_length)

    sources = [read_records(file, parse, skipped) for file in chosen_files(data.paths)]
    return limited(sources, data.limit)


def as_rows(pair: Pair, line_break: int) -> list[Sample]:
    """Return the two rows of a pair."""
    rows = []
    for answer in pair[1:]:
        ids = np.array([*pair.prompt, *answer, line_break], dtype=np.int32)
        place = np.arange(len(ids))
        rows.append(Sample(ids, (place >= len(pair.prompt)) & (place < len(ids) - 1)))
    return rows


def write_pairs(folder: Path, sides: dict[str, list[Pair]], data: DataConfig, template, summary) -> None:
    """Write the rows of each side, end to end, and a summary. Raises `UserError` for an empty side."""
    samples = {}
    for side, pairs in sides.items():
        if not pairs:
            raise UserError(
                f"--data {' '.join(data.paths)}: no pair to {'train on' if side == TRAIN else 'hold out'}. A "
                "model that samples its own must be right sometimes, not always: change pairs.prompts, "
                "pairs.samples or the skill; of files, give more, or change data.val_fraction "
                f"({'; '.join(line.strip() for line in summary)})"
            )
        rows = [row for pair in pairs for row in as_rows(pair, template.end_of_turn[-1])]
        lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
        samples[side] = part = Samples(*map(np.concatenate, zip(*rows, strict=True)), lengths)
        for name, values in (("ids", part.ids), ("targets", part.targets), ("lengths", lengths)):
            (folder / f"{side}.{name}").write_bytes(values.tobytes())
        summary = [*summary, f"{side}: {len(pairs):,} pairs, {len(part.ids):,} tokens"]
    meta = {"digest": samples_digest(samples), "summary": summary}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def open_pairs(folder: Path, template: ChatTemplate) -> PairData:
    """Map what `write_pairs` has written."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    sides = [map_samples(folder, side, "int32") for side in (TRAIN, VAL)]
    return PairData(template, *sides, meta["summary"], meta["digest"])


class PairLoader(ChatLoader):
    """Endless training batches of `batch_size` pairs: 2 x `batch_size` rows, the rows of a pair together."""

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch and move to its beginning."""
        self.starts = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows.lengths) // 2)
        self.epoch, self.index_in_epoch = epoch, 0

    def batch(self, pairs: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the tensors of the rows of some pairs, see `DialogueRows.batch`."""
        return pair_batch(self.rows, pairs)


def pair_batch(rows: DialogueRows, pairs: Iterable[int]) -> dict[str, torch.Tensor]:
    """Return the tensors of the rows of some pairs, one below the other."""
    return rows.batch([[2 * pair + row] for pair in pairs for row in (0, 1)])


def eval_pair_batches(
    samples: Samples, sequence_length: int, batch_size: int, max_batches: int | None, rank: int = 0,
    world_size: int = 1, *, pad_id: int,
) -> Batches:  # fmt: skip
    """Yield batches with every pair once, in order; with `max_batches` (per rank), as many as that allows,
    evenly spread."""
    rows = DialogueRows(samples, sequence_length, packing=False, pad_id=pad_id)
    for chosen in eval_batches(len(samples) // 2, batch_size, max_batches, rank, world_size):
        yield pair_batch(rows, chosen)
