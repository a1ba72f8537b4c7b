"""Reinforcement learning without a critic: a model samples answers and learns from those that do better.

    python train/grpo_train.py                                 the fine-tuned model in out/, on expressions
    python train/grpo_train.py --data skills:sums --set rl.recipe=dr_grpo --out out/sums
    python train/grpo_train.py --set rl.kl=none                one piece of a recipe changed (config/rl.py)
    python train/grpo_train.py --set rl.lora=true --set lora.r=16 --set optim.lr=0.001

What makes this stage: its data are its own answers to questions that a rule can judge (train/engine/
rollouts.py), each compared with the others to the same question; its loss is a policy gradient, and the
distance to the model it started from, which is kept frozen as the reference (train/engine/policy_loss.py);
all parameters are trainable but those of a second head, which no answer uses; it saves the last weights, and
answers before and after training (samples.txt beside the log). Dropout is off.

With `--set rl.lora=true`, only an adapter trains (section `lora`), beside a frozen base. The reference is
then the base without the adapter, and takes no memory; TinySeek_GRPOLora_final.pkl holds the adapter.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from train.engine.command import chat_command, parse_command
from train.engine.machine import start_machine
from train.engine.policy_base import open_policy
from train.engine.policy_stage import policy_stage, train_policy
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "grpo_train", "GRPO"


def main():
    """Train the base, or an adapter of it, on its own samples."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT",), lora=lambda config: config.rl.lora)
    machine = start_machine(command.config)
    stage = policy_stage(open_policy(command, machine), command, machine)
    train_policy(stage, command, machine)
    machine.say(f"\nnext: {chat_command(command.short, command.out)}")
    finish()


if __name__ == "__main__":
    run_main(main)
