"""LoRA: a finished model learns something more through thin factors beside its frozen matrices.

    python train/lora_train.py                                  a new skill for the fine-tuned model in out/
    python train/lora_train.py --data dialogues.jsonl --set lora.r=16 --set lora.use_dora=true --out out/own
    python inference/chat.py --adapter out/TinySeek_Lora_final.pkl

What makes this stage: its data and its loss are those of sft_train.py; trainable are the factors A and B (and
DoRA's magnitudes) of the layers that `lora.target_modules` names, a few percent of all parameters, while the
base stays as it is, bit by bit; it saves these alone, with a hash of the base that they belong to.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  first: it says how threads wait, before PyTorch loads
from load_data.chat.chat_data import prepare_chat
from model.adapters import attach
from train.engine.command import parse_command
from train.engine.fine_tuning import dialogue_stage, open_base, train_and_score
from train.engine.machine import start_machine
from utils.checkpoint import final_name
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "lora_train", "Lora"


def main():
    """Thin factors beside frozen matrices, on dialogues."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT", "Pre"))
    config, machine = command.config, start_machine(command.config)
    base = open_base(command, machine, adapted=True)
    own = attach(base.model, SHORT, config)  # frozen is all the rest
    data = prepare_chat(config, base.tokenizer)
    stage = dialogue_stage(STAGE, SHORT, base, data, config, machine, own)
    train_and_score(stage, data, command, machine)
    machine.say(f"\nnext: python inference/chat.py --adapter {command.out / final_name(SHORT)}")
    finish()


if __name__ == "__main__":
    run_main(main)
