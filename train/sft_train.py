"""Supervised fine-tuning (SFT): a model that continues text learns to answer.

    python train/sft_train.py                              the pre-trained model in out/, on embedded skills
    python train/sft_train.py --data dialogues.jsonl --init out/book/TinySeek_Pre_final.pkl --out out/book
    python load_data/show.py                               what the model sees, and which tokens it learns

What makes this stage: its data are dialogues, packed into rows in which they do not see each other; its loss
is cross-entropy at the tokens of the answers alone (the questions are given, not to be learned); all
parameters are trainable; it saves the weights that did best on held-out dialogues.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  first: it says how threads wait, before PyTorch loads
from load_data.chat.chat_data import prepare_chat
from train.engine.command import parse_command
from train.engine.fine_tuning import dialogue_stage, open_base, train_and_score
from train.engine.machine import start_machine
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "sft_train", "SFT"


def main():
    """All weights of the base, on dialogues."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("Pre",))
    config, machine = command.config, start_machine(command.config)
    base = open_base(command, machine)
    data = prepare_chat(config, base.tokenizer)
    stage = dialogue_stage(STAGE, SHORT, base, data, config, machine)
    train_and_score(stage, data, command, machine)
    machine.say('\nnext: python inference/chat.py --prompt "你是谁？"')
    finish()


if __name__ == "__main__":
    run_main(main)
