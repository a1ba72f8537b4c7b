"""The parts of distillation: the teacher, the student, and the stage of a student beside its teacher."""

import math
from dataclasses import replace
from pathlib import Path

from torch import nn

from config.schema import RunConfig
from inference.generation.load import CHAT_STAGES, Loaded, load_full
from load_data.tokenization.tokenizer import Tokenizer
from model.tinyseek import TinySeek
from modules.distillation.hidden import HiddenProjection, layer_pairs
from train.engine.command import Command, default_base, inherited_sections
from train.engine.distill_loss import PROJECTION, STUDENT, DistillLoss
from train.engine.fine_tuning import Base, check_length, open_base
from train.engine.machine import Machine
from train.engine.stage import Stage
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

FLAG = "--set distill.teacher="
BASES = {"text": ("Long", "Pre"), "dialogues": CHAT_STAGES}  # of the teacher, by the form of the data


def teacher_path(config: RunConfig, out: Path) -> Path:
    """Return the checkpoint of the teacher."""
    if config.distill.teacher:
        return Path(config.distill.teacher)
    return default_base("distill_train", BASES[config.distill.task], out, f"{FLAG}FILE")


def lent_sections(config: RunConfig, out: Path) -> dict:
    """Return the settings that a student takes from its teacher: the tokenizer, and the data held out."""
    path = teacher_path(config, out)
    sections = inherited_sections(load_checkpoint(path), str(path), flag=FLAG)
    return {name: sections[name] for name in ("tokenizer", "data")}


def open_teacher(command: Command, machine: Machine) -> Loaded:
    """Load the teacher."""
    path = teacher_path(command.config, command.out)
    teacher = load_full(path)
    size = sum(part.numel() for part in teacher.model.parameters())
    machine.say(f"teacher: {path} ({teacher.about['stage']}, {size:,} parameters, weights {teacher.digest})")
    return teacher


def open_student(command: Command, teacher: Loaded, machine: Machine) -> Base:
    """Return the student: that of `--init`, or a new one with the teacher's tokenizer. Raises `UserError` if
    it does not fit the teacher, before any data are read or written."""
    student = open_base(command, machine) if command.init else new_student(command, teacher)
    check_same_tokens(command.config.distill.kinds, student.tokenizer, teacher.tokenizer)
    check_fit(command.config, student.model.config, teacher.model.config, teacher.tokenizer.vocab_size)
    return student


def new_student(command: Command, teacher: Loaded) -> Base:
    """Return a student with random weights and the teacher's tokenizer."""
    model, needed = command.config.model, teacher.tokenizer.vocab_size
    model.vocab_size = model.vocab_size or needed
    if model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the {needed} tokens of the teacher's "
            "tokenizer: leave it out, or set it to at least that"
        )
    check_length(command.config)
    return Base(TinySeek(model), teacher.tokenizer, {})


def with_teacher(stage: Stage, teacher: Loaded, config: RunConfig, machine: Machine) -> Stage:
    """Return the stage of a student with a teacher beside it, and a projection for hidden states. The
    projection is trained and resumed with the student; what is saved as the result is the student."""
    student, settings, vocabulary = stage.model, config.distill, teacher.tokenizer.vocab_size
    pairs = layer_pairs(
        student.config.num_hidden_layers, teacher.model.config.num_hidden_layers, settings.layer_map
    )
    if settings.layers:
        pairs = list(enumerate(settings.layers))
    heads = settings.relation_heads or math.gcd(*head_counts(student.config, teacher.model.config))
    parts = {STUDENT: student}
    if settings.hidden != "none":
        sizes = student.config.hidden_size, teacher.model.config.hidden_size
        parts[PROJECTION] = HiddenProjection(pairs, *sizes)
    return replace(
        stage, model=nn.ModuleDict(parts), result=STUDENT,
        loss=DistillLoss(student, teacher.model, vocabulary, pairs, heads, config, machine),
        evaluate=StudentEvaluation(stage.evaluate), frozen={"teacher": teacher.model},
    )  # fmt: skip


class StudentEvaluation:
    """The evaluation of the student among what is trained."""

    def __init__(self, evaluate):
        self.evaluate, self.batches = evaluate, evaluate.batches

    def __call__(self, models, max_batches: int | None) -> dict[str, float]:
        """Measure the student."""
        return self.evaluate(models[STUDENT], max_batches)


def check_same_tokens(kinds: list[str], student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise `UserError` for kinds that compare token by token if the two read a text as different tokens."""
    if kinds and student.digest != teacher.digest:
        why = "probabilities are of different tokens" if kinds[0] == "logits" else "tokens do not line up"
        off = " and ".join(f"distill.{kind}=none" for kind in kinds)
        raise UserError(
            f"distill.{kinds[0]}: the student of --init and the teacher have different tokenizers, so "
            f"their {why}: set {off}, or start from a model with the teacher's tokenizer"
        )


def head_counts(*configs) -> list[int]:
    """Return the numbers of query heads and of key/value heads of all models."""
    return [count for one in configs for count in (one.num_attention_heads, one.num_key_value_heads)]


def check_fit(config: RunConfig, student, teacher, vocabulary: int) -> None:
    """Raise `UserError` where the two models do not fit together."""
    rules = *shared_rules(config, student, teacher, vocabulary), *inner_rules(config, student, teacher)
    if broken := [message for wrong, message in rules if wrong]:
        raise UserError(broken[0])


def shared_rules(config: RunConfig, student, teacher, vocabulary: int):
    """Yield for each rule whether it is broken, and the error."""
    length, places, settings = config.data.sequence_length, teacher.max_position_embeddings, config.distill
    new, top = settings.max_new_tokens, settings.top_k
    yield settings.kinds and length > places, (
        f"data.sequence_length={length} is more than the {places} positions of the teacher: lower it"
    )
    # A question may fill a row, and the student's answer follows it. Beyond the positions that it was trained
    # on, a teacher still computes logits, but they mean nothing.
    yield settings.on_policy and min(length + new, student.max_position_embeddings) - 1 > places, (
        f"data.sequence_length={length} and distill.max_new_tokens={new} of a sample behind it are more than "
        f"the {places} positions of the teacher: lower one"
    )
    yield settings.on_policy == 1 and student.mtp != "none", (
        f"distill.on_policy=1 leaves model.mtp={student.mtp} nothing to learn, since samples are no truth: "
        "lower it"
    )
    yield top and top > vocabulary, (
        f"distill.top_k={top} is more than the {vocabulary} tokens of the vocabulary: lower it, or omit it"
    )


def inner_rules(config: RunConfig, student, teacher):
    """Yield the same for the kinds that compare hidden states or attention."""
    settings, inside = config.distill, [kind for kind in config.distill.kinds if kind != "logits"]
    if not inside:
        return
    layers, ours, theirs = settings.layers, student.num_hidden_layers, teacher.num_hidden_layers
    yield layers is not None and (len(layers) != ours or not all(0 <= one < theirs for one in layers)), (
        f"distill.layers={layers} must name a layer of the teacher, 0 to {theirs - 1}, for each of the "
        f"{ours} of the student"
    )
    yield layers is None and settings.layer_map == "uniform" and theirs < ours, (
        f"distill.layer_map=uniform: the teacher has {theirs} layers, fewer than the {ours} of the student: "
        "say which layer meets which with distill.layers"
    )
    yield config.train.compile, (
        f"distill.{inside[0]} looks into layers, and train.compile=true hides them: set it to false"
    )
    if settings.attention == "none":
        return
    yield "mla" in (student.attention_kind, teacher.attention_kind), (
        f"distill.attention={settings.attention} needs model.attention_kind=gqa in both models: set it "
        "to none"
    )
    if settings.attention == "maps":
        heads = student.num_attention_heads, teacher.num_attention_heads
        yield heads[0] != heads[1], (
            f"distill.attention=maps needs as many heads in both models, and the student has {heads[0]}, the "
            f"teacher {heads[1]}: set distill.attention=relations"
        )
        yield student.dual_chunk_attention_config or teacher.dual_chunk_attention_config, (
            "distill.attention=maps cannot read dual chunk attention: set distill.attention=relations"
        )
    elif heads := settings.relation_heads:
        widths = [count * one.head_dim for one in (student, teacher) for count in head_counts(one)]
        yield any(width % heads for width in widths), (
            f"distill.relation_heads={heads} must divide the widths of queries and keys, {widths[0]} and "
            f"{widths[1]} of the student, {widths[2]} and {widths[3]} of the teacher: omit it"
        )
