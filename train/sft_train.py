"""Supervised fine-tuning (SFT): a model that continues text learns to answer.

    python train/sft_train.py                              the pre-trained model in out/, on embedded skills
    python train/sft_train.py --data dialogues.jsonl --init out/book/TinySeek_Pre_final.pkl --out out/book
    python load_data/show.py                               what the model sees, and what is supervised

What makes this stage: its data are dialogues, packed into rows in which they do not see each other; its loss
is the cross-entropy of the answers alone (the questions are given); all parameters are trainable; it saves
the weights that did best on held-out dialogues. With `--config qat` it computes with weights rounded to
4 bits, and saves a model on codes, which computes what training computed.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from load_data.chat.chat_data import prepare_chat
from model.fake import round_in_training
from train.engine.command import chat_command, parse_command
from train.engine.fine_tuning import dialogue_stage, open_base, train_and_score
from train.engine.machine import start_machine
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "sft_train", "SFT"


def main():
    """Train all weights of the base, on dialogues."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("Pre",))
    config, machine = command.config, start_machine(command.config)
    base = open_base(command, machine)
    coded_result = round_in_training(base.model, config.qat) if config.qat.bits else None
    data = machine.read(prepare_chat, config, base.tokenizer)
    stage = dialogue_stage(STAGE, SHORT, base, data, config, machine)
    stage.final_entries = coded_result or stage.final_entries
    train_and_score(stage, data, command, machine)
    machine.say(f'\nnext: {chat_command(SHORT, command.out)} --prompt "你是谁？"')
    finish()


if __name__ == "__main__":
    run_main(main)
