"""Shared by the stages that learn from pairs: the base, the pairs, the stage, and answers of
a policy before and after."""

from functools import partial

import torch

from load_data.chat.chat_data import chosen_skills
from load_data.chat.pairs import PairData, PairLoader, eval_pair_batches
from train.engine.command import Command
from train.engine.fine_tuning import Base, train_and_score
from train.engine.machine import Machine
from train.engine.policy_base import open_policy
from train.engine.policy_evaluation import SHOWN, PolicyEvaluation, held_out_items
from train.engine.preference_loss import PairEvaluation, PairLoss, PairSource
from train.engine.sampled_pairs import prepare_pairs
from train.engine.stage import Stage
from utils import distributed


def open_pair_base(command: Command, machine: Machine) -> tuple[Base, PairData]:
    """Load the model of `--init`, and the pairs."""
    base = open_policy(command, machine)
    data = machine.read(prepare_pairs, command.config, base, machine)
    machine.say("\n".join(data.summary))
    return base, data


def pair_stage(
    model: torch.nn.Module, loss: PairLoss, data: PairData, command: Command, machine: Machine, **more
) -> Stage:
    """Return a stage that trains `model` with `loss` on the pairs; `more`: further fields of the stage."""
    train, world, length = command.config.train, machine.world, command.config.data.sequence_length
    rows = {"packing": False, "pad_id": data.tokenizer.pad_id}
    steps = (train.batch_size, train.accumulation_steps, world.rank, world.size, train.seed)
    held_out = partial(eval_pair_batches, data.val, length, train.batch_size, rank=world.rank,
                       world_size=world.size, pad_id=data.tokenizer.pad_id)  # fmt: skip
    return Stage(
        name=command.stage, short=command.short, model=model, loss=loss,
        source=PairSource(PairLoader(data.train, length, *steps, **rows)),
        evaluate=PairEvaluation(held_out, len(data.val) // 2, train.batch_size, loss, machine),
        tokenizer=data.tokenizer, data_digest=data.digest, **more,
    )  # fmt: skip


def train_and_show(stage: Stage, data: PairData, command: Command, machine: Machine) -> None:
    """Train and score a policy as fine-tuning does; write sampled answers to held-out questions of the
    skills, before and after."""
    config = command.config
    items = held_out_items(chosen_skills(config.data.paths), SHOWN, config.data.val_fraction)
    shown = PolicyEvaluation(items, data.template, config.pairs, None, machine.world, config.train.seed)

    def answers() -> list[str]:
        with distributed.all_or_none():
            return shown.sampled(stage.model.to(machine.device)) if items and machine.world.is_first else []

    before = answers()
    train_and_score(stage, data, command, machine)
    if after := answers():
        path = command.out / stage.name / "samples.txt"
        shown.write_side_by_side(path, before, after)
        machine.say(f"answers before and after: {path}")
