"""Distillation by text: the teacher writes answers to training questions, and the student learns them.

    teacher     whatever the teacher writes, right or wrong: sequence-level distillation (arXiv 1606.07947)
    solutions   worked solutions that the verifier accepts, each as two tasks: the working followed by the
                value, and the value alone (distilling step by step, arXiv 2305.02301)
    labels      no teacher: the value alone, from the data's own answers; the baseline of the others

    47 + 38   teacher writes   7,8=15 4,3,1=8: 85     ->   <think>7,8=15 4,3,1=8</think>85    asked to think
                                                           85                                 asked not to

The request, with thinking or without, tells the two tasks apart. The teacher is asked with thinking for a
skill that has thoughts (`thought_sums`), and otherwise shows its working within the answer.

Text needs no common vocabulary: teacher and student each use their own tokenizer. Only training questions are
asked; the held-out side has the skill's own answers in the same form. An answer that was cut off, or that
spells out a sum reserved for scoring, is left out.

Answers are made once, by the first process, before training; a folder of the cache keeps them for a resumed
run and for other runs with the same teacher, questions and seed.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from config.schema import RunConfig
from inference.generation.conversation import prompt_within
from inference.generation.exchange import Request, respond
from inference.generation.generator import Generator
from inference.generation.load import Loaded
from inference.generation.sampling import SamplingParams, row_seed
from load_data.chat.chat_data import (
    SKILL_WORD, VAL_PER_SKILL, ChatData, chosen_skills, open_dialogues, what_decides, write_dialogues,
)  # fmt: skip
from load_data.chat.chat_template import ChatTemplate, Message, Messages
from load_data.chat.records import message
from load_data.corpora.reserved import holds_reserved_sum
from load_data.corpora.sources import TRAIN, VAL
from load_data.packing import REPOSITORY, prepared_folder
from load_data.skills import Item, held_out_dialogues, skill_named
from load_data.skills.verifiers import verify
from train.engine.sampled_pairs import QUESTIONS, questions
from utils.errors import UserError

THINKING = ("thought_sums",)  # skills that work in thoughts


def prepare_answers(config: RunConfig, template: ChatTemplate, teacher: Loaded | None, device) -> ChatData:
    """Return dialogues of one turn with the answers of kind `distill.answers`, made now or cached, encoded
    with the student's `template`. `labels` need no teacher."""
    data, settings, kind = config.data, config.distill, config.distill.answers
    if others := [path for path in data.paths if path.partition(":")[0] != SKILL_WORD]:
        raise UserError(f"--data {' '.join(others)}: distill.answers={kind} asks questions of skills; name "
                        "skills:arithmetic, for example")  # fmt: skip
    decides = [kind, settings.questions, data.limit, data.val_fraction, config.train.seed]
    if kind != "labels":
        if not teacher.answers:
            raise UserError(f"{teacher.path}: a model of {teacher.about['stage']}, which was not trained to "
                            "answer; name a fine-tuned teacher (python train/sft_train.py)")  # fmt: skip
        decides += [teacher.digest, teacher.template.before, teacher.tokenizer.digest]
        decides += [settings.max_new_tokens, settings.answer_temperature]
    decides += what_decides(data, template)
    cache, given = REPOSITORY / data.cache_dir, (config, template, teacher, device)
    return open_dialogues(prepared_folder(cache, "answers", decides, write_folder, *given), template)


def write_folder(folder: Path, config: RunConfig, template: ChatTemplate, teacher, device) -> None:
    """Write the dialogues of both sides."""
    notes = []
    write_dialogues(folder, dialogues(config, teacher, device, notes), config.data, template, lambda: notes)


def dialogues(config: RunConfig, teacher, device, notes: list[str]) -> Iterator[tuple[str, Messages]]:
    """Yield every dialogue with its side; add to `notes` what became of the teacher's answers."""
    names, kind = chosen_skills(config.data.paths), config.distill.answers
    for name in names:
        for *asked, answer in held_out_dialogues([name], VAL_PER_SKILL, 0, config.data.val_fraction):
            yield from ((VAL, [*asked, *form]) for form in forms(kind, name, answer))
    if kind != "labels":
        generator = Generator(teacher.model.to(device), teacher.tokenizer.eos_id)
    chosen = questions(config, names, TRAIN, config.distill.questions)
    for name, items in groupby(chosen, key=lambda item: item.skill):
        items = list(items)
        if kind == "labels":
            answers = ((item, message("assistant", item.expected)) for item in items)
        else:
            answers = written_answers(generator, teacher.template, items, config)
        fates, worked = Counter(), 0
        for item, answer in answers:
            fates[fate := fate_of(kind, item, answer)] += 1
            if fate == "kept":
                worked += kind != "solutions" or bool(working_of(name, answer)[0])
                yield from ((TRAIN, [*item.messages, *form]) for form in forms(kind, name, answer))
        found = ", ".join(f"{count:,} {fate}" for fate, count in fates.most_common())
        if not worked:
            what = "worked out no right answer" if kind == "solutions" else "finished no answer"
            raise UserError(
                f"distill.answers={kind}: the teacher {what} to {len(items):,} questions of {name} "
                f"({found}); raise distill.max_new_tokens, or change skill or teacher"
            )
        notes.append(f"{name}: {len(items):,} questions; {kind}: {found}")


def written_answers(
    generator: Generator, template: ChatTemplate, items: list[Item], config: RunConfig
) -> Iterator[tuple[Item, Message | None]]:
    """Yield the teacher's answer to each of `items`, which are of one skill; None if it is unfinished."""
    settings, request = config.distill, Request(thinking=items[0].skill in THINKING)
    params = SamplingParams(settings.answer_temperature or 0.0, max_new_tokens=settings.max_new_tokens)
    room = generator.room(settings.max_new_tokens)
    for first in tqdm(range(0, len(items), QUESTIONS), "the teacher answers", leave=False, disable=None):
        batch = items[first : first + QUESTIONS]
        prompts = [prompt_within(template, item.messages, room, request.thinking) for item in batch]
        seeds = [row_seed(config.train.seed, first + place, 0) for place in range(len(batch))]
        found = respond(generator, template, prompts, params, request, seeds=seeds)
        for item, one in zip(batch, found, strict=True):
            whole = one.finish_reason == "stop" and one.messages[-1]["content"]
            yield item, one.messages[-1] if whole else None


def fate_of(kind: str, item: Item, answer: Message | None) -> str:
    """Return `kept`, or the reason why an answer is left out."""
    if answer is None:
        return "unfinished"
    if holds_reserved_sum(f"{answer['content']}\n{answer.get('thinking')}"):
        return "with a reserved sum"
    return "wrong" if kind == "solutions" and not verify(item, answer["content"]) else "kept"


def forms(kind: str, name: str, answer: Message) -> list[Messages]:
    """Return what the student is to write for an answer of skill `name`: one message for each task."""
    if kind == "teacher":
        return [[answer]]
    working, label = working_of(name, answer)
    at_once = message("assistant", label)
    return [[at_once]] if kind == "labels" else [[at_once | {"thinking": working}], [at_once]]


def working_of(name: str, answer: Message) -> tuple[str, str]:
    """Return the working of an answer of skill `name`, which may be empty, and its value."""
    label = skill_named(name).scored(answer["content"])
    working = answer.get("thinking") or answer["content"].strip().removesuffix(label)
    return working.rstrip(" :"), label
