"""What all skills share: a sample, and the side on which it belongs.

A skill makes random samples. Where a sample belongs is decided by its key alone, by the same hash on every
machine: nine tenths of all keys are for training, the rest is divided evenly into `val` and `test`. So a
question that a model is scored on was in no training text, of this stage or of an earlier one.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from load_data.corpora.reserved import is_reserved, unit_hash

TRAIN, VAL, TEST = SIDES = ("train", "val", "test")
# Sums of two small numbers, overlapping ones too, in any spacing; a longer number, a decimal or a name at
# either end makes another sum of it.
SMALL_SUM = re.compile(r"(?<![\w.])(?=(\d{1,2} ?[+-] ?\d{1,2})(?!\w|\.\d))")


@dataclass(frozen=True)
class Sample:
    """A question and its answer. `key` is what a model must not have seen when it is scored on the sample;
    `parts` are the keys of other samples that can be read in this one."""

    key: str
    question: str
    answer: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skill:
    """`sample(rng, side)` draws a sample of one side; `is_right(question, expected, answer)` judges."""

    sample: Callable[[random.Random, str], Sample]
    is_right: Callable[[str, str, str], bool]


def side_of(sample: Sample) -> str | None:
    """Where a sample belongs; None: nowhere, as its key is free for training, but a part of it is not."""
    if is_reserved(sample.key):
        return held_out_side(sample.key)
    sums = SMALL_SUM.findall(f"{sample.question}\n{sample.answer}")  # `3 - 8` and `-5` hold no `8 - 5`
    return None if any(map(is_reserved, (*sample.parts, *sums))) else TRAIN


def held_out_side(key: str) -> str:
    """`val` or `test`, by a hash of `key` that does not depend on the one that held it out."""
    return VAL if unit_hash("val:" + "".join(key.split())) < 0.5 else TEST


def by_side(make: Callable[[random.Random], Sample]) -> Callable[[random.Random, str], Sample]:
    """From a function that draws any sample, one that draws until the side is the one asked for."""

    def sample(rng: random.Random, side: str) -> Sample:
        while side_of(drawn := make(rng)) != side:
            pass
        return drawn

    return sample


def is_exact(question: str, expected: str, answer: str) -> bool:
    """Right is what equals the expected answer, white space around it aside."""
    return answer.strip() == expected
