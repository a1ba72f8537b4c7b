"""Definitions shared by all skills: a sample, and the side it belongs to.

A skill makes random samples. A hash of a sample's key, the same on every machine, decides its side: nine
tenths of all keys are for training, and the rest is divided evenly into `val` and `test`. A question
that is used for scoring therefore occurs in no training text, of this stage or an earlier one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from load_data.corpora.reserved import SMALL_SUM, is_reserved, item_key, unit_hash

TRAIN, VAL, TEST = SIDES = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """A question and its answer. A model that is scored on the sample must not have seen its `key`;
    `parts` are the keys of other samples contained in this one."""

    key: str
    question: str
    answer: str
    parts: tuple[str, ...] = ()
    thinking: str | None = None  # before the answer; None where the request asks for none
    call: dict | None = None  # of a tool, before the answer, and its result
    result: str = ""


def side_of(sample: Sample) -> str | None:
    """Return the side of a sample; None if its key is for training but one of its parts is held out."""
    if is_reserved(sample.key):
        return held_out_side(sample.key)
    text = f"{sample.question}\n{sample.answer}\n{sample.thinking}\n{sample.call}"
    sums = SMALL_SUM.findall(text)  # `3 - 8` and `-5` contain no `8 - 5`
    return None if any(map(is_reserved, (*sample.parts, *sums))) else TRAIN


def held_out_side(key: str) -> str:
    """Return `val` or `test`, by a hash of `key` that is independent of the one that held it out."""
    return VAL if unit_hash("val:" + item_key(key)) < 0.5 else TEST


def by_side(make: Callable[[random.Random], Sample]) -> Callable[[random.Random, str, float], Sample]:
    """Return a function that calls `make` until the sample is on the requested side."""

    def sample(rng: random.Random, side: str, val_fraction: float) -> Sample:
        while side_of(drawn := make(rng)) != side:
            pass
        return drawn

    return sample


def joined(things: list[str], comma: str, last: str) -> str:
    """Return `things` as an enumeration in words."""
    return last.join(filter(None, (comma.join(things[:-1]), things[-1])))
