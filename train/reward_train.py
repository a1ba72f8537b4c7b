"""A reward model: it learns from pairs of answers to give the better one the higher number.

    python train/reward_train.py                   from the fine-tuned model in out/, on pairs of its answers
    python train/reward_train.py --data pairs.jsonl --init out/book/TinySeek_SFT_final.pkl --out out/book
    python train/grpo_train.py --set rl.reward=out/TinySeek_Reward_final.pkl

What makes this stage: its data are those of dpo_train.py; its loss is Bradley and Terry's, the likelihood of
the preferences; its model is the base's decoder with a head of one output, read at the last token of an
answer, and all its weights train; it saves the weights that order most held-out pairs correctly.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from model.scalar import ScalarModel
from train.engine.command import chat_command, parse_command
from train.engine.machine import start_machine
from train.engine.preference_loss import RewardLoss
from train.engine.preference_stage import open_pair_base, pair_stage
from train.engine.trainer import Trainer
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "reward_train", "Reward"


def main():
    """Train a reward model on pairs of answers."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT",))
    config, machine = command.config, start_machine(command.config)
    base, data = open_pair_base(command, machine)
    model = ScalarModel.from_policy(base.model)
    stage = pair_stage(model, RewardLoss(), data, command, machine, keep_best="val_acc")
    found = Trainer(stage, config, machine, command.out, command.resume).run()
    machine.say(f"in {found['val_acc']:.1%} of the held-out pairs, the better answer has the higher reward")
    machine.say(f"\nnext: {chat_command(SHORT, command.out)}")
    finish()


if __name__ == "__main__":
    run_main(main)
