"""Prefix tuning: the smallest of adapters, learned keys and values that every token can look at.

    python train/prefix_train.py                                a new skill for the fine-tuned model in out/
    python train/prefix_train.py --set prefix.kind=prompt --out out/prompt     embeddings after the roles
    python inference/chat.py --adapter out/TinySeek_Prefix_final.pkl

What makes this stage: its data and its loss are those of sft_train.py; trainable are `prefix.length` keys and
values in every layer (kind `prefix`), or as many embeddings after each role marker (kind `prompt`: System,
User, Assistant), while the base stays as it is, bit by bit; it saves these alone, with a hash of their base.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  first: it says how threads wait, before PyTorch loads
from load_data.chat.chat_data import prepare_chat
from model.adapters import attach, soft_tokens
from train.engine.command import parse_command
from train.engine.fine_tuning import check_length, dialogue_stage, open_base, train_and_score
from train.engine.machine import start_machine
from utils.checkpoint import final_name
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "prefix_train", "Prefix"


def main():
    """Learned keys and values before the text, on dialogues."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT", "Pre"))
    config, machine = command.config, start_machine(command.config)
    base = open_base(command, machine, adapted=True)
    own = attach(base.model, SHORT, config)  # frozen is all the rest
    check_length(config, base.model.prefix_length)
    data = prepare_chat(config, base.tokenizer, soft_tokens(SHORT, config))
    stage = dialogue_stage(STAGE, SHORT, base, data, config, machine, own)
    train_and_score(stage, data, command, machine)
    machine.say(f"\nnext: python inference/chat.py --adapter {command.out / final_name(SHORT)}")
    finish()


if __name__ == "__main__":
    run_main(main)
