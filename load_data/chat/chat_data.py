"""From paths to dialogues as ids, each on its side of the split into training and validation.

Dialogues come from `.jsonl` files (see `load_data/chat/records.py`), or from the embedded skills: `skills`
are
those of fine-tuning, `skills:lists,shopping` the named ones, `skills:all` all of them. Skills know what they
hold out; a dialogue of a file is put on its side by a hash of its first question, as in pre-training, so that
the same question is never on both.

A dialogue that is too long for a row loses its oldest turns first; then the beginning of its question, and
only then the end of its answer. An answer without its end is learned without `<|im_end|>`: it would teach to
stop in the middle.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config.schema import DataConfig, RunConfig
from load_data.chat.chat_template import ChatTemplate, Messages, fit_turns, joined
from load_data.corpora.documents import find_files, read_records
from load_data.chat.records import as_messages, first_question
from load_data.corpora.reserved import unit_hash
from load_data.skills import SFT_SKILLS, SKILLS, held_out_dialogues, training_dialogues
from load_data.corpora.sources import PYTHON, TRAIN, VAL
from load_data.tokenization.tokenizer import Tokenizer
from utils.errors import UserError

SKILL_WORD = "skills"
VAL_PER_SKILL = 100  # held-out dialogues of each skill


class Sample(NamedTuple):
    """One dialogue: ids (n,) int32, and targets (n,) bool, which of them are learned."""

    ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class ChatData:
    """What chat stages read."""

    tokenizer: Tokenizer
    template: ChatTemplate
    train: list[Sample]
    val: list[Sample]
    train_dialogues: list[Messages]  # what `train` was made from, in its order, not shortened
    val_dialogues: list[Messages]
    summary: list[str]  # lines for a person
    digest: str  # identifies all ids, what is learned of them, and their order


def prepare_chat(config: RunConfig, tokenizer: Tokenizer, soft_tokens: int = 0) -> ChatData:
    """The dialogues that `config.data` names, in the ids of its template; none is longer than
    `data.sequence_length` + 1. Raises `UserError` for data that is no dialogue and for a side without any.
    """
    data = config.data
    template = ChatTemplate(tokenizer, data.template, soft_tokens, config.model.vocab_size or None)
    names, files = chosen_skills(data.paths), chosen_files(data.paths)
    samples, dialogues = {TRAIN: [], VAL: []}, {TRAIN: [], VAL: []}
    shortened = {TRAIN: 0, VAL: 0}
    for side, messages in islice(split_dialogues(data, names, files), data.limit):
        sample, was_cut = encode(template, messages, data.sequence_length + 1)
        samples[side].append(sample)
        shortened[side] += was_cut
        dialogues[side].append(messages)
    summary = [f"skills: {', '.join(names)}"] if names else []
    summary += [f"{file}: {file.stat().st_size:,} bytes" for file in files]
    summary.append(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.digest}")
    for side, part in samples.items():
        if not part:
            raise empty_side(side, data)
        summary.append(
            f"{side}: {len(part):,} dialogues, {sum(len(one.ids) for one in part):,} tokens, "
            f"{sum(int(one.targets.sum()) for one in part):,} of them learned, {shortened[side]:,} dialogues "
            f"shortened to {data.sequence_length + 1} tokens"
        )
    digest = samples_digest(samples)
    parts = (samples[TRAIN], samples[VAL], dialogues[TRAIN], dialogues[VAL])
    return ChatData(tokenizer, template, *parts, summary, digest)


def chosen_skills(paths: list[str]) -> list[str]:
    """The names of the skills that `paths` mean, each once."""
    names = []
    for path in paths:
        word, _, rest = path.partition(":")
        if word == SKILL_WORD:
            everything = {"": SFT_SKILLS, "all": SKILLS}
            names += everything.get(rest, [name.strip() for name in rest.split(",")])
    if unknown := [name for name in names if name not in SKILLS]:
        raise UserError(f"--data: unknown skill {unknown[0]!r}; skills: {', '.join(SKILLS)}, or all")
    return list(dict.fromkeys(names))


def chosen_files(paths: list[str]) -> list[Path]:
    """The `.jsonl` files that `paths` mean."""
    paths = [path for path in paths if path.partition(":")[0] != SKILL_WORD]
    for path in paths:
        if path == PYTHON:
            raise UserError(
                "--data python: source code is for train/pre_train.py; chat stages read dialogues: .jsonl "
                "files, or the word skills"
            )
        if not Path(path).exists():
            raise UserError(
                f"--data {path}: no such file or folder; the word skills means the embedded skills"
            )
        if Path(path).suffix.lower() == ".txt":
            raise no_dialogues(path)
    found = {path: [file for file in find_files([path]) if file.suffix.lower() == ".jsonl"] for path in paths}
    for path, files in found.items():
        if not files:  # a folder of .txt files
            raise no_dialogues(path)
    return [file for files in found.values() for file in files]


def split_dialogues(data: DataConfig, names: list[str], files: list[Path]) -> Iterator[tuple[str, Messages]]:
    """Every dialogue with its side, without the limit."""
    if names:
        held_out = list(held_out_dialogues(names, VAL_PER_SKILL, 0))
        if data.limit:  # they come first, so a limit would otherwise leave nothing to train on
            random.Random(0).shuffle(held_out)
            held_out = held_out[: max(1, round(data.limit * data.val_fraction))]
        yield from ((VAL, messages) for messages in held_out)
        yield from ((TRAIN, messages) for messages in training_dialogues(names, data.skill_samples, 0))
    for file in files:
        for record, where in read_records(file):
            messages = checked_turns(as_messages(record, where), where)
            held_out = unit_hash(first_question(record, where)) < data.val_fraction
            yield (VAL if held_out else TRAIN), messages


def checked_turns(messages: Messages, where: str) -> Messages:
    """Messages in an order that makes sense: perhaps one of the system, then user and assistant in turn. A
    last question without an answer is left out."""
    system = messages[0]["role"] == "system"
    for number, message in enumerate(messages[system:]):
        role, expected = message["role"], ("user", "assistant")[number % 2]
        if role != expected:
            raise UserError(
                f"{where}: message {system + number + 1} has role {role} where {expected} is expected; a "
                "dialogue is one system message or none, then user and assistant in turn"
            )
    answered = system + (len(messages) - system) // 2 * 2
    if answered == system:
        raise UserError(f"{where}: no message of the assistant, so there is nothing to learn; leave it out")
    return messages[:answered]


def encode(template: ChatTemplate, messages: Messages, room: int) -> tuple[Sample, bool]:
    """A dialogue as ids, at most `room` of them, and whether it had to be shortened."""
    ids, targets = template.dialogue(messages)
    too_long = len(ids) > room
    if too_long:
        kept = fit_turns(template, messages, room)
        ids, targets = template.dialogue(kept)
        if len(ids) > room:
            ids, targets = cut_turn(template, kept, room)
    return Sample(np.array(ids, dtype=np.int32), np.array(targets, dtype=bool)), too_long


def cut_turn(template: ChatTemplate, messages: Messages, room: int) -> tuple[list[int], list[bool]]:
    """One turn that is too long, perhaps with a system message, cut to `room` ids.

    The question loses its beginning, then the answer its end, each down to a quarter of the room; then the
    system message its end. Markers stay.
    """
    parts = {message["role"]: template.turn(message) for message in messages}
    over, least = sum(len(ids) for ids, _ in parts.values()) - room, max(1, room // 4)
    for role, keep in {"user": least, "assistant": least, "system": 0}.items():
        if role in parts:
            before, after = len(template.before[role]), len(template.after[role])
            if role == "assistant":
                after = 0  # an answer that is cut has no end
            ids, targets = parts[role]
            count = max(0, min(over, len(ids) - before - after - keep))
            start = before if role == "user" else len(ids) - after - count
            del ids[start : start + count], targets[start : start + count]
            over -= count
    if over > 0:
        raise UserError(
            f"data.sequence_length={room - 1} is too short for the markers of one turn and a few words: "
            f"raise it, to {4 * (room + over)} for example"
        )
    return joined(parts.values())


def samples_digest(samples: dict[str, list[Sample]]) -> str:
    """16 hexadecimal digits from all ids, what is learned of them, and their order."""
    total = hashlib.sha256()
    for part in samples.values():
        total.update(len(part).to_bytes(8, "little"))
        for sample in part:
            total.update(
                len(sample.ids).to_bytes(8, "little") + sample.ids.tobytes() + sample.targets.tobytes()
            )
    return total.hexdigest()[:16]


def no_dialogues(path: str) -> UserError:
    """The error for plain text."""
    return UserError(
        f"--data {path}: plain text; chat stages read dialogues, one JSON object per line of a .jsonl file: "
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
    )


def empty_side(side: str, data: DataConfig) -> UserError:
    """The error for a split that leaves a side without dialogues."""
    name, change = {TRAIN: ("training", "lower"), VAL: ("validation", "raise")}[side]
    return UserError(
        f"--data {' '.join(data.paths)}: after the split there is no dialogue for {name}; {change} "
        f"data.val_fraction (now {data.val_fraction}), or give more dialogues"
    )
