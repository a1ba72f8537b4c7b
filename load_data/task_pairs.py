"""Tasks for an encoder-decoder as pairs of texts, from what every machine has: nothing is downloaded.

    lists         a sentence                                    the things in it: ['milk', 'eggs']
    docstrings    a function of Python's standard library       the first sentence of its docstring

The split is that of the rest of the project: lists by the combination of things (load_data/skills/lists.py),
docstrings by file, with the held-out files of pre-training, whose pairs are left out where they stand in a
training file too. `val` decides which weights are kept, `test` is what a result is scored on.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from config.schema import RunConfig
from load_data.code_pairs import docstring_pairs
from load_data.corpora.python_corpus import read_python_corpus
from load_data.seq2seq import Pair, framed_pair
from load_data.skills import scored_items, training_items
from load_data.skills.common import SIDES, TEST, TRAIN, VAL, held_out_side
from load_data.skills.docstrings import first_sentence
from load_data.tokenization.tokenizer import Tokenizer
from utils.errors import UserError

SCORED = 300  # held-out lists of each side

Texts = tuple[str, str]  # source, target


@dataclass(frozen=True)
class TaskPairs:
    """The pairs of a task as ids, by side, in memory."""

    tokenizer: Tokenizer
    sides: dict[str, list[Pair]]
    summary: list[str]  # lines to print
    digest: str  # identifies all ids and their order


def prepare_task(config: RunConfig, tokenizer: Tokenizer) -> TaskPairs:
    """Return the pairs of `span.task`. A source loses what is beyond `data.sequence_length`, and a pair whose
    target is longer than `span.target_length` is left out."""
    source_room, target_room = config.data.sequence_length - 2, config.span.target_length - 1
    sides, summary, total = {side: [] for side in SIDES}, [], hashlib.sha256(tokenizer.digest.encode())
    cut, left_out = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
    by_side = {side: [] for side in SIDES}
    for side, *texts in TASKS[config.span.task](config):
        by_side[side].append(texts)
    for side, pairs in by_side.items():
        for source, target in zip(*(map(tokenizer.encode_batch, zip(*pairs))), strict=True) if pairs else ():
            cut[side] += len(source) > source_room
            left_out[side] += len(target) > target_room
            if len(target) <= target_room:
                sides[side].append(framed_pair(tokenizer, source[:source_room], target))
                total.update(repr(sides[side][-1]).encode())
        if not sides[side]:
            raise UserError(
                f"span.task={config.span.task} has no {side} pair: raise data.val_fraction, or "
                "span.target_length"
            )
        supervised = sum(len(pair.target) for pair in sides[side])
        summary.append(
            f"{side}: {len(sides[side]):,} pairs, {supervised:,} tokens to write; {cut[side]:,} sources cut "
            f"to {source_room} tokens, {left_out[side]:,} pairs with longer targets left out"
        )
    return TaskPairs(tokenizer, sides, summary, total.hexdigest()[:16])


def lists(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (side, sentence, its things)."""
    training = islice(training_items(["lists"], 0), config.data.skill_samples)
    held_out = {side: scored_items("lists", SCORED, 0, side=side) for side in (VAL, TEST)}
    for side, items in ({TRAIN: training} | held_out).items():
        for item in items:
            yield side, item.messages[0]["content"], item.expected


def docstrings(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (side, function without its docstring, first sentence of the docstring)."""
    corpus = read_python_corpus(config.data.val_fraction)
    scored = {*chain.from_iterable(map(docstring_pairs, corpus.val))}
    for held_out, files in ((False, corpus.train), (True, corpus.val)):
        for paragraph, code in chain.from_iterable(map(docstring_pairs, files)):
            sentence = first_sentence(paragraph)
            if sentence and (held_out or (paragraph, code) not in scored):  # some stand in several files
                yield held_out_side(code) if held_out else TRAIN, code, sentence


TASKS = {"lists": lists, "docstrings": docstrings}
