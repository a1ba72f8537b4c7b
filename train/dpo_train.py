"""Preference optimisation: a model learns which of two answers to give, without a reward model.

    python train/dpo_train.py                      the fine-tuned model in out/, on pairs of its own answers
    python train/dpo_train.py --data pairs.jsonl --init out/book/TinySeek_SFT_final.pkl --out out/book
    python train/dpo_train.py --set dpo.kind=simpo           or ipo, or orpo

What makes this stage: its data are pairs of answers to one prompt, `{"prompt", "chosen", "rejected"}` from
files, or for skills the model's own right and wrong samples; its loss is DPO or one of its kin
(modules/alignment/preference.py); all weights train except a second head (MTP), while DPO and IPO hold on to
a frozen copy of the base, the reference; it saves a whole model. Dropout is off. With `--set dpo.lora=true`
it trains and saves an adapter, as train/grpo_train.py does.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from modules.alignment.preference import WITH_REFERENCE
from train.engine.command import chat_command, parse_command
from train.engine.machine import start_machine
from train.engine.policy_base import policy_parts
from train.engine.preference_loss import PreferenceLoss
from train.engine.preference_stage import open_pair_base, pair_stage, train_and_show
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "dpo_train", "DPO"


def main():
    """Train the base, or an adapter of it, on pairs of answers."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT",), lora=lambda config: config.dpo.lora)
    config, machine = command.config, start_machine(command.config)
    base, data = open_pair_base(command, machine)
    parts = policy_parts(base, command, machine, reference=config.dpo.kind in WITH_REFERENCE)
    loss = PreferenceLoss(config.dpo, parts["frozen"].get("reference"))
    stage = pair_stage(base.model, loss, data, command, machine, **parts)
    train_and_show(stage, data, command, machine)
    machine.say(f"\nnext: {chat_command(command.short, command.out)}")
    finish()


if __name__ == "__main__":
    run_main(main)
