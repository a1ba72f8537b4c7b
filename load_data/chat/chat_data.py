"""Read dialogues from paths, encode them as ids, and split them into training and validation.

Dialogues come from `.jsonl` files (see `load_data/chat/records.py`), or from the built-in skills: `skills`
means those of fine-tuning, `skills:lists,shopping` the named ones, `skills:all` all without thinking and
tools. Skills split their own questions. A dialogue from a file is held out if the hash of any of its
questions selects it, as in pre-training, so no held-out question is ever trained on.

A dialogue that is too long for a row loses its oldest turns first, then the beginning of its question, and
only then the end of its answer. A cut answer has no `<|im_end|>`: that would teach stopping mid-sentence.

The result is cached as in `load_data/packing.py`, in a folder `dialogues_<hash>`, and memory-mapped.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config.schema import DataConfig, RunConfig
from load_data.chat.chat_template import ChatTemplate, Messages, cut_turn, fit_turns
from load_data.chat.records import as_messages, split_key
from load_data.corpora.documents import find_files, read_records, skipped_lines
from load_data.corpora.reserved import unit_hash
from load_data.corpora.sources import PYTHON, TRAIN, VAL, Sources, empty_side, limited
from load_data.packing import REPOSITORY, prepared_folder
from load_data.skills import PART_SKILLS, SFT_SKILLS, SKILLS, held_out_dialogues, training_dialogues
from load_data.tokenization.tokenizer import Tokenizer
from utils.errors import UserError

SKILL_WORD = "skills"
VAL_PER_SKILL = 100  # held-out dialogues of each skill


class Sample(NamedTuple):
    """One dialogue: ids (n,) uint16, or int32 if necessary, and targets (n,) bool, True if supervised."""

    ids: np.ndarray
    targets: np.ndarray


class Samples(Sequence):
    """Dialogues stored end to end, in memory or mapped from disk. Items are views."""

    def __init__(self, ids: np.ndarray, targets: np.ndarray, lengths: np.ndarray):
        self.ids, self.targets, self.bounds = ids, targets, np.append(0, np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Sample:
        span = slice(self.bounds[:-1][index], self.bounds[1:][index])
        return Sample(self.ids[span], self.targets[span])


@dataclass(frozen=True)
class ChatData:
    """The data of a chat stage, mapped from disk."""

    tokenizer: Tokenizer
    template: ChatTemplate
    train: Samples
    val: Samples
    summary: list[str]  # lines to print
    digest: str  # identifies all ids, their order, and which are supervised
    folder: Path

    def dialogues(self, side: str) -> Iterator[Messages]:
        """Yield the original messages of `train` or `val`, in order and not shortened."""
        with open(self.folder / f"{side}.messages", "rb") as file:
            yield from map(json.loads, file)


def prepare_chat(config: RunConfig, tokenizer: Tokenizer, soft_tokens: int = 0) -> ChatData:
    """Return the dialogues that `config.data` names, encoded with its template in at most
    `data.sequence_length` + 1 ids. Raises `UserError` for data without dialogues and for an empty side."""
    data = config.data
    template = ChatTemplate(tokenizer, data.template, soft_tokens, config.model.vocab_size)
    decides = what_decides(data, template)
    folder = prepared_folder(REPOSITORY / data.cache_dir, "dialogues", decides, write_folder, data, template)
    return open_dialogues(folder, template)


def what_decides(data: DataConfig, template: ChatTemplate) -> list:
    """Return what decides which dialogues there are and their ids, for the name of their folder."""
    tokenizer, read = template.tokenizer, [str(file) for file in chosen_files(data.paths)]
    read += [PYTHON] * ("docstrings" in chosen_skills(data.paths))  # this skill asks about the library
    decides = [Sources(replace(data, paths=read)).fingerprint, data.paths, data.skill_samples, VAL_PER_SKILL]
    decides += [tokenizer.digest, template.before, data.sequence_length]  # templates differ in their markers
    return decides + ["own"] * (template.kind == "own")


def open_dialogues(folder: Path, template: ChatTemplate) -> ChatData:
    """Map what `write_dialogues` has written."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    sides = [map_samples(folder, side, meta["dtype"]) for side in (TRAIN, VAL)]
    return ChatData(template.tokenizer, template, *sides, meta["summary"], meta["digest"], folder)


def write_folder(folder: Path, data: DataConfig, template: ChatTemplate) -> None:
    """Write the dialogues that `data` names."""
    names, skipped = chosen_skills(data.paths), []
    about = [f"skills: {', '.join(names)}"] * bool(names)
    about += [f"{file}: {file.stat().st_size:,} bytes" for file in chosen_files(data.paths)]
    dialogues = split_dialogues(data, skipped)
    write_dialogues(folder, dialogues, data, template, lambda: about + skipped_lines(skipped))


def write_dialogues(
    folder: Path, dialogues: Iterable[tuple[str, Messages]], data: DataConfig, template: ChatTemplate,
    about: Callable[[], list[str]],
) -> None:  # fmt: skip
    """Write the files of each side: ids, targets and lengths end to end, and messages as lines of JSON.

    `about()` returns the first lines of the summary, after the last dialogue was written.
    """
    tokenizer, room = template.tokenizer, data.sequence_length + 1
    largest = max(tokenizer.vocab_size - 1, *(one for ids in template.before.values() for one in ids))
    dtype = "uint16" if largest < 2**16 else "int32"
    samples, shortened = {}, {TRAIN: 0, VAL: 0}
    with ExitStack() as stack:
        files = {(side, part): stack.enter_context(open(folder / f"{side}.{part}", "wb"))
                 for side in shortened for part in ("ids", "targets", "lengths", "messages")}  # fmt: skip
        for side, messages in dialogues:
            sample, was_cut = encode(template, messages, room)
            shortened[side] += was_cut
            files[side, "ids"].write(sample.ids.astype(dtype).tobytes())
            files[side, "targets"].write(sample.targets.tobytes())
            files[side, "lengths"].write(np.int64(len(sample.ids)).tobytes())
            files[side, "messages"].write(json.dumps(messages).encode() + b"\n")
    summary = about()
    summary.append(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.digest}")
    for side in shortened:
        if not (folder / f"{side}.ids").stat().st_size:
            raise empty_side(side, data)
        samples[side] = part = map_samples(folder, side, dtype)
        summary.append(
            f"{side}: {len(part):,} dialogues, {len(part.ids):,} tokens, {part.targets.sum():,} of them "
            f"supervised, {shortened[side]:,} dialogues shortened to {room} tokens"
        )
    meta = {"dtype": dtype, "digest": samples_digest(samples), "summary": summary}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def map_samples(folder: Path, side: str, dtype: str) -> Samples:
    """Memory-map one side, which must not be empty."""
    ids = np.asarray(np.memmap(folder / f"{side}.ids", dtype, mode="r"))  # slicing a memmap costs more
    targets = np.asarray(np.memmap(folder / f"{side}.targets", bool, mode="r"))
    return Samples(ids, targets, np.fromfile(folder / f"{side}.lengths", np.int64))


def chosen_skills(paths: list[str]) -> list[str]:
    """Return the names of the skills in `paths`, each once."""
    names = []
    for path in paths:
        word, _, rest = path.partition(":")
        if word == SKILL_WORD:
            plain = [name for name in SKILLS if name not in PART_SKILLS]
            everything = {"": SFT_SKILLS, "all": plain}
            names += everything.get(rest, [name.strip() for name in rest.split(",")])
    if unknown := [name for name in names if name not in SKILLS]:
        raise UserError(f"--data: unknown skill {unknown[0]!r}; skills: {', '.join(SKILLS)}, or all")
    return list(dict.fromkeys(names))


def chosen_files(paths: list[str]) -> list[Path]:
    """Return the `.jsonl` files that `paths` name."""
    files = []
    for path in paths:
        if path.partition(":")[0] == SKILL_WORD:
            continue
        found = find_files([path]) if path != PYTHON else []
        found = [file for file in found if file.suffix.lower() == ".jsonl"]
        if not found:
            raise UserError(
                f"--data {path}: plain text is for train/pre_train.py; chat stages read skills, or dialogues "
                'from .jsonl files, each line an object {"messages": [{"role": "user", "content": ...}, '
                '{"role": "assistant", "content": ...}]}'
            )
        files += found
    return files


def split_dialogues(data: DataConfig, skipped: list[str]) -> Iterator[tuple[str, Messages]]:
    """Yield every dialogue with its side. Under `data.limit`, the skills and each file contribute equal
    shares. The errors of bad records are added to `skipped`."""
    names, files = chosen_skills(data.paths), chosen_files(data.paths)
    sources = [skill_dialogues(data, names, 1 + len(files))] if names else []
    sources += [file_dialogues(file, data, skipped) for file in files]
    return limited(sources, data.limit)


def skill_dialogues(data: DataConfig, names: list[str], sources: int) -> Iterator[tuple[str, Messages]]:
    """Yield held-out dialogues of the skills `names`, then those to train on."""
    held_out = list(held_out_dialogues(names, VAL_PER_SKILL, 0, data.val_fraction))
    if data.limit:  # they come first, so a limit would otherwise leave nothing to train on
        random.Random(0).shuffle(held_out)
        held_out = held_out[: max(1, round(data.limit / sources * data.val_fraction))]
    yield from ((VAL, messages) for messages in held_out)
    for messages in training_dialogues(names, data.skill_samples, 0, data.val_fraction):
        yield TRAIN, messages


def file_dialogues(file: Path, data: DataConfig, skipped: list[str]) -> Iterator[tuple[str, Messages]]:
    """Yield the dialogues of one file."""
    for messages in read_records(file, checked_turns, skipped):
        held_out = unit_hash(split_key(messages, data.same_question)) < data.val_fraction
        yield (VAL if held_out else TRAIN), messages


def checked_turns(record: dict, where: str) -> Messages:
    """Return the messages of a record in a valid order: at most one system message, then user and assistant
    in turn. A last question without an answer is dropped."""
    messages = as_messages(record, where)
    system = messages[0]["role"] == "system"
    for number, message in enumerate(messages[system:]):
        role, expected = message["role"], ("user", "assistant")[number % 2]
        if role != expected:
            raise UserError(
                f"{where}: message {system + number + 1} has role {role} where {expected} is expected; a "
                "dialogue is at most one system message, then user and assistant in turn"
            )
    answered = system + (len(messages) - system) // 2 * 2
    if answered == system:
        raise UserError(f"{where}: no assistant message, so there is nothing to supervise; remove it")
    return messages[:answered]


def encode(template: ChatTemplate, messages: Messages, room: int) -> tuple[Sample, bool]:
    """Return a dialogue as at most `room` ids, and whether it had to be shortened."""
    ids, targets = template.dialogue(messages)
    too_long = len(ids) > room
    if too_long:
        kept = fit_turns(template, messages, room)
        ids, targets = template.dialogue(kept)
        if len(ids) > room:
            ids, targets = cut_turn(template, kept, room)
        if len(ids) > room:
            raise UserError(
                f"data.sequence_length={room - 1} is too short for the markers of one turn and a few words: "
                f"raise it, for example to {4 * len(ids)}"
            )
    dtype = np.uint16 if max(ids) < 2**16 else np.int32
    return Sample(np.array(ids, dtype=dtype), np.array(targets, dtype=bool)), too_long


def samples_digest(samples: dict[str, Sequence[Sample]]) -> str:
    """Return a digest (16 hexadecimal digits) of all ids, their order and their loss masks."""
    total = hashlib.sha256()
    for part in samples.values():
        total.update(len(part).to_bytes(8, "little"))
        for sample in part:
            ids = sample.ids.astype(np.int32).tobytes()
            total.update(len(sample.ids).to_bytes(8, "little") + ids + sample.targets.tobytes())
    return total.hexdigest()[:16]
