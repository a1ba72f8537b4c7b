"""Skills: things that a small model can learn to answer, as dialogues made from a seed, with nothing to
download.

Every skill divides its own questions into training, validation and test (see `common.py`): a test question,
and a sum or an expression of one, is in no training dialogue and in no text of pre-training.
`SFT_SKILLS` are what fine-tuning learns from when no data is given; the others are left for adapters.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from load_data.chat.records import message
from load_data.skills import arithmetic, docstrings, expressions, identity, lists, naming, shopping
from load_data.skills.common import TEST, TRAIN, VAL, Sample, Skill
from utils.errors import UserError

# How often a turn is of this skill, and the skill. Arithmetic needs by far the most examples, and each of
# them is short; long answers, such as docstrings, take more of the loss than their share of turns.
REGISTRY: dict[str, tuple[float, Skill]] = {
    "identity": (0.05, identity.SKILL),
    "arithmetic": (0.45, arithmetic.SKILL),
    "lists": (0.15, lists.SKILL),
    "expressions": (0.30, expressions.SKILL),
    "docstrings": (0.05, docstrings.SKILL),
    "shopping": (0.25, shopping.SKILL),
    "naming": (0.25, naming.SKILL),
}
SKILLS = tuple(REGISTRY)
SFT_SKILLS = ("identity", "arithmetic", "lists", "expressions", "docstrings")
TURNS, TURN_WEIGHTS = (1, 2, 3), (6, 1, 1)  # how many questions in one dialogue


@dataclass(frozen=True)
class Item:
    """A question to score: `messages` end with it, `expected` is the answer."""

    skill: str
    messages: list[dict[str, str]]
    expected: str


def skill_named(name: str) -> Skill:
    """The skill of this name, or a `UserError`."""
    if name not in REGISTRY:
        raise UserError(f"unknown skill {name!r}; skills: {', '.join(SKILLS)}")
    return REGISTRY[name][1]


def training_dialogues(names, count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """`count` dialogues of one to three turns, each turn of one of the skills `names`, by their weights. The
    same ones for the same arguments. Raises `UserError` for an unknown name."""
    skills = [skill_named(name) for name in names]
    weights = [REGISTRY[name][0] for name in names]
    return generated(skills, weights, count, random.Random(f"training {seed}"))


def generated(skills, weights, count: int, rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """The dialogues of `training_dialogues`."""
    for _ in range(count):
        turns = rng.choices(TURNS, TURN_WEIGHTS)[0]
        samples = [skill.sample(rng, TRAIN) for skill in rng.choices(skills, weights, k=turns)]
        yield [part for sample in samples for part in as_turn(sample)]


def held_out_dialogues(names, count_per_skill: int, seed: int) -> list[list[dict[str, str]]]:
    """Dialogues of one turn, `count_per_skill` of each skill or as many as it has, for validation."""
    return [
        as_turn(sample) for name in names for sample in distinct_samples(name, VAL, count_per_skill, seed)
    ]


def scored_items(name: str, count: int, seed: int) -> list[Item]:
    """`count` items of one skill, or as many as it has, no two with the same key. Raises `UserError` for an
    unknown name."""
    samples = distinct_samples(name, TEST, count, seed)
    return [Item(name, as_turn(sample)[:1], sample.answer) for sample in samples]


def is_right(item: Item, answer: str) -> bool:
    """Whether `answer` is right, as the item's skill sees it: mostly, whether it is the expected one."""
    return skill_named(item.skill).is_right(item.messages[-1]["content"], item.expected, answer)


def as_turn(sample: Sample) -> list[dict[str, str]]:
    """A question and its answer as messages."""
    return [message("user", sample.question), message("assistant", sample.answer)]


def distinct_samples(name: str, side: str, count: int, seed: int) -> list[Sample]:
    """At most `count` samples of one side with different keys. A skill with few keys soon repeats itself, and
    is left after twenty draws for each sample asked for."""
    skill, rng, found = skill_named(name), random.Random(f"{side} {seed}"), {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        sample = skill.sample(rng, side)
        found.setdefault(sample.key, sample)
    return list(found.values())
