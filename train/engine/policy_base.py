"""The start of a policy: the model without noise, the part of it that trains, and its reference.

    all weights    the reference is a frozen copy of the base
    LoRA           the reference is the base without the adapter, in the same memory: no second copy

The adapter starts at zero, so either way the policy and its reference are equal at first.
"""

import copy

from inference.generation.load import answers_questions
from load_data.chat.chat_data import chosen_skills
from model.adapters import attach, put_on_codes, twin
from train.engine.command import Command
from train.engine.fine_tuning import Base, open_base
from train.engine.machine import Machine
from utils.errors import UserError

NOISE = ("model.dropout", "model.attention_dropout", "model.router_jitter_noise")


def open_policy(command: Command, machine: Machine) -> Base:
    """Load the model of `--init` without noise: with it, a policy does not score its own samples as it
    sampled them, and comparisons of answers are blurred. Samples need a model that answers."""
    stage = command.init.get("stage")
    if chosen_skills(command.config.data.paths) and not answers_questions(command.init):
        raise UserError(
            f"--init {command.init_path}: a model of {stage}, which was not trained to answer, so its "
            "samples teach nothing; name a fine-tuned one (python train/sft_train.py)"
        )
    for setting in (*NOISE, *["lora.lora_dropout"] * command.lora):
        section, name = setting.split(".")
        if getattr(getattr(command.config, section), name):
            machine.say(f"{setting} is set to 0: answers are sampled and compared without noise")
            setattr(getattr(command.config, section), name, 0.0)
    return open_base(command, machine, adapted=command.lora)


def policy_parts(base: Base, command: Command, machine: Machine, reference: bool) -> dict:
    """Return the fields of a `Stage` that say what trains, what is saved, and what the reference is."""
    model, own, other = base.model, None, None
    if command.lora:
        put_on_codes(model, "Lora", command.config)
        model.to(machine.device)  # first: memory is shared only until one of two models moves
        other, own = twin(model), attach(model, "Lora", command.config)
    elif reference:
        other = copy.deepcopy(model)
    if model.mtp is not None:
        model.mtp.requires_grad_(False)  # no answer uses a second head
    return {
        "frozen": {"reference": other} if reference else {},
        "trains": lambda name: not name.startswith("mtp.") and (own is None or name in own),
        "own": own, "base": base.record if command.lora else None,
    }  # fmt: skip
