"""Tiny students beside tiny teachers, and steps of uneven rows."""

from types import SimpleNamespace

import torch

from config.model import ModelConfig
from model.tinyseek import TinySeek
from tests.modules.tools import shake
from tests.modules.tools import small_config as teacher_config
from tests.train.tools import TOKENIZER, ListLoader, NoEvaluation, machine, small_config
from train.engine.distill_stage import with_teacher
from train.engine.stage import LoaderSource, Stage
from train.engine.trainer import Trainer

V = TOKENIZER.vocab_size
ALL = ("distill.hidden=mse", "distill.attention=relations")
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}
MOE = tuple(f"model.{key}={value}" for key, value in EXPERTS.items())


def student_config(*settings, steps=4):
    """A student of 2 layers and 16 channels, with more ids than there are tokens."""
    return small_config(f"model.vocab_size={V + 3}", "optim.schedule=cosine", "optim.warmup_steps=0",
                        "optim.eps=0.001", *settings, steps=steps)  # fmt: skip


def make_teacher(seed=0, **changes):
    """A teacher of 3 layers and 24 channels: 4 heads on 2, experts, dropout, and other spare ids."""
    shape = EXPERTS | {"vocab_size": V + 7, "num_hidden_layers": 3, "dropout": 0.3, "attention_dropout": 0.3}
    model = shake(TinySeek(teacher_config(**(shape | changes))), seed)
    return SimpleNamespace(model=model.requires_grad_(False).eval(), tokenizer=TOKENIZER)


def make_student(config, seed=1) -> TinySeek:
    """Random weights; the dimensions of heads differ from the teacher's."""
    assert isinstance(config.model, ModelConfig)
    return shake(TinySeek(config.model), seed)


def steps_of(micro_batches=4, rows=1, count=6, seed=5):
    """Steps of packed and padded rows of 9 tokens, of which a row may have all labels, few or none."""
    generator, steps = torch.Generator().manual_seed(seed), []
    for step in range(count):
        ids = torch.randint(0, V, (micro_batches * rows, 10), generator=generator)
        labels, real = ids[:, 1:].clone(), torch.ones(micro_batches * rows, 9, dtype=torch.bool)
        share = torch.tensor([1.0, 0.4, 0.8, 0.0]).repeat(rows * micro_batches)[: len(ids), None]
        labels[torch.rand(labels.shape, generator=generator) >= share] = -100
        for row in range(len(ids)):
            real[row, 9 - row % 3 :] = False
        labels[~real] = -100
        documents = torch.zeros(len(ids), 9, dtype=torch.long)
        documents[step % 2 :: 2, 4:] = 1
        batch = {"input_ids": ids[:, :-1], "labels": labels, "padding_mask": real, "document_ids": documents}
        steps.append([{key: value[start : start + rows].contiguous() for key, value in batch.items()}
                      for start in range(0, len(ids), rows)])  # fmt: skip
    return steps


def make_stage(config, teacher, student=None, loader=None, place=None):
    """The stage of a student beside its teacher."""
    alone = Stage(
        "toy", "Distill", student or make_student(config), LoaderSource(loader or ListLoader(steps_of())),
        None, NoEvaluation(), TOKENIZER, "digest",
    )  # fmt: skip
    return with_teacher(alone, teacher, config, place or machine())


def make_run(out, config, teacher, loader=None, resume=False, change=lambda stage: stage, **place):
    """A `Trainer`; `change` is done to its stage, and `place` to the machine."""
    stage = change(make_stage(config, teacher, None, loader, machine(**place)))
    return Trainer(stage, config, machine(**place), out, resume)
