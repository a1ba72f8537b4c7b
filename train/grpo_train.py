"""Reinforcement learning without a critic: a model samples answers and learns from those that do better.

    python train/grpo_train.py                                 the fine-tuned model in out/, on expressions
    python train/grpo_train.py --data skills:sums --set rl.recipe=dr_grpo --out out/sums
    python train/grpo_train.py --set rl.kl=none --set rl.kl_weight=0     one piece of a recipe (config/rl.py)

What makes this stage: its data are its own answers to questions that a rule can judge (train/engine/
rollouts.py), each compared with the others to the same question; its loss is a policy gradient, and the
distance to the model it started from, which is kept frozen as the reference (train/engine/policy_loss.py);
all parameters are trainable but those of a second head, which no answer uses; it saves the last weights.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from train.engine.command import chat_command, parse_command
from train.engine.fine_tuning import open_base
from train.engine.machine import start_machine
from train.engine.policy_stage import policy_stage, train_policy
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "grpo_train", "GRPO"


def main():
    """Train all weights of the base on its own samples."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT",))
    config, machine = command.config, start_machine(command.config)
    base = open_base(command, machine)
    stage = policy_stage(STAGE, SHORT, base, config, machine)
    train_policy(stage, command, machine)
    machine.say(f"\nnext: {chat_command(SHORT, command.out)}")
    finish()


if __name__ == "__main__":
    run_main(main)
