"""Skills: small tasks as dialogues generated from a seed, with nothing to download.

Every skill splits its questions into training, validation and test (see `common.py`): no test question, and
no sum or expression in one, occurs in a training dialogue or in the text of pre-training. Fine-tuning without
`--data` uses `SFT_SKILLS`; the others are for adapters, `sums` for rewards, and `PART_SKILLS` teach thinking
and tools.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from config.schema import DataConfig
from load_data.chat.chat_template import Messages
from load_data.chat.records import message
from load_data.corpora.reserved import item_key
from load_data.skills import arithmetic, docstrings, expressions, identity, lists, naming, shopping, sums
from load_data.skills import thought_sums, tool_sums
from load_data.skills.common import TEST, TRAIN, VAL, Sample, by_side
from utils.errors import UserError


@dataclass(frozen=True)
class Skill:
    """`weight` is how often a turn is of this skill; `sample(rng, side, val_fraction)` draws a sample of one
    side (`val_fraction` of the standard library is held out); `scored` returns the part of an answer that
    counts."""

    weight: float
    sample: Callable[[random.Random, str, float], Sample]
    scored: Callable[[str], str] = str.strip


# Arithmetic needs by far the most examples, and they are short; long answers, such as docstrings, take a
# larger share of the loss than of the turns.
REGISTRY = {
    "identity": Skill(0.05, by_side(identity.make)),
    "arithmetic": Skill(0.45, by_side(arithmetic.make), arithmetic.value_of),
    "lists": Skill(0.15, by_side(lists.make)),
    "expressions": Skill(0.30, by_side(expressions.make)),
    "docstrings": Skill(0.05, docstrings.sample),
    "shopping": Skill(0.25, by_side(shopping.make)),
    "naming": Skill(0.25, by_side(naming.make)),
    "sums": Skill(0.20, by_side(sums.make), arithmetic.value_of),
    "thought_sums": Skill(0.45, by_side(thought_sums.make)),
    "tool_sums": Skill(0.25, by_side(tool_sums.make)),
}
SKILLS = tuple(REGISTRY)
PART_SKILLS = ("thought_sums", "tool_sums")  # they need tokens that older tokenizers lack
SFT_SKILLS = ("identity", "arithmetic", "lists", "expressions", "docstrings")
HELD_OUT = DataConfig().val_fraction  # of the standard library, for the skill docstrings
TURNS, TURN_WEIGHTS = (1, 2, 3), (6, 1, 1)  # how many questions in one dialogue


@dataclass(frozen=True)
class Item:
    """A question to score: the last of `messages`; `expected` is its answer."""

    skill: str
    messages: Messages
    expected: str


def skill_named(name: str) -> Skill:
    """Return the skill of this name; raise `UserError` if there is none."""
    if name not in REGISTRY:
        raise UserError(f"unknown skill {name!r}; skills: {', '.join(SKILLS)}")
    return REGISTRY[name]


def training_dialogues(names, count: int, seed: int, val_fraction: float = HELD_OUT) -> Iterator[Messages]:
    """Yield `count` dialogues of one to three turns, each of one of the skills `names`, drawn by weight.
    Equal arguments give equal dialogues. Raises `UserError` for an unknown name."""
    skills, rng = [skill_named(name) for name in names], random.Random(f"training {seed}")
    weights = [skill.weight for skill in skills]
    for _ in range(count):
        turns = rng.choices(TURNS, TURN_WEIGHTS)[0]
        samples = [skill.sample(rng, TRAIN, val_fraction) for skill in rng.choices(skills, weights, k=turns)]
        yield [part for sample in samples for part in as_turn(sample)]


def held_out_dialogues(names, count: int, seed: int, val_fraction: float = HELD_OUT) -> list[Messages]:
    """Return dialogues of one turn for validation: `count` of each skill, or all it has."""
    found = (distinct_samples(name, VAL, count, seed, val_fraction) for name in names)
    return [as_turn(sample) for samples in found for sample in samples]


def scored_items(
    name: str, count: int, seed: int, val_fraction: float = HELD_OUT, side: str = TEST
) -> list[Item]:
    """Return `count` items of one skill, or all it has, no two with the same key. Raises `UserError` for an
    unknown name."""
    samples = distinct_samples(name, side, count, seed, val_fraction)
    return [Item(name, as_turn(sample)[:1], sample.answer) for sample in samples]


def training_items(names, seed: int, val_fraction: float = HELD_OUT, start: int = 0) -> Iterator[Item]:
    """Yield training items without end, each of one of the skills `names`, drawn by weight.

    Item n depends on `seed` and n alone: `start` continues after that many items.
    """
    skills = [skill_named(name) for name in names]
    weights = [skill.weight for skill in skills]
    for number in itertools.count(start):
        rng = random.Random(f"items {seed} {number}")
        (name,) = rng.choices(names, weights)
        sample = REGISTRY[name].sample(rng, TRAIN, val_fraction)
        yield Item(name, as_turn(sample)[:1], sample.answer)


def is_right(item: Item, answer: str) -> bool:
    """Return whether `answer` is the expected one, as far as the item's skill scores it."""
    scored = skill_named(item.skill).scored
    return scored(answer) == scored(item.expected)


def as_turn(sample: Sample) -> Messages:
    """Return a question and its answer as messages, with thinking, or a call of a tool and its result."""
    turn = [message("user", sample.question), message("assistant", sample.answer)]
    if sample.thinking is not None:
        turn[-1]["thinking"] = sample.thinking
    if sample.call:
        called = message("assistant", "") | {"tool_calls": [sample.call]}
        turn[1:1] = [called, message("tool", sample.result)]
    return turn


def distinct_samples(name: str, side: str, count: int, seed: int, val_fraction: float) -> list[Sample]:
    """Return at most `count` samples of one side with distinct keys. A skill with few keys repeats itself, so
    drawing stops after 20 times `count` samples."""
    skill, rng, found = skill_named(name), random.Random(f"{side} {seed}"), {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        sample = skill.sample(rng, side, val_fraction)
        found.setdefault(item_key(sample.key), sample)
    return list(found.values())
