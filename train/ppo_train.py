"""Proximal policy optimization (PPO): a policy learns from its own answers, and a critic judges every token.

    python train/ppo_train.py                                  the fine-tuned model in out/, on expressions
    python train/ppo_train.py --data skills:sums --set rl.lam=1 --out out/sums

What makes this stage: its data are its own answers to questions that a rule can judge (train/engine/
rollouts.py), each token compared with what the critic expected; its loss is the clipped policy gradient, and
that of the critic (train/engine/actor_critic.py); the distance to the model it started from is part of the
reward; all parameters of both models are trainable but those of a second head, which no answer uses; it saves
the policy, and in checkpoints on the way the critic as well. `--set rl.lora=true` trains an adapter of the
policy, as in train/grpo_train.py, and all weights of the critic. Dropout is off.

An answer that was cut at the limit of tokens counts as ended: nothing is expected after its last token.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from train.engine.actor_critic import with_critic
from train.engine.command import chat_command, parse_command
from train.engine.machine import start_machine
from train.engine.policy_base import open_policy
from train.engine.policy_stage import policy_stage, train_policy
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "ppo_train", "PPO"


def main():
    """Train the base, or an adapter of it, and a critic, on samples of the base."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT",), lora=lambda config: config.rl.lora)
    machine = start_machine(command.config)
    stage = policy_stage(open_policy(command, machine), command, machine, critic=True)
    train_policy(with_critic(stage, command.config), command, machine)
    machine.say(f"\nnext: {chat_command(command.short, command.out)}")
    finish()


if __name__ == "__main__":
    run_main(main)
