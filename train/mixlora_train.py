"""MixLoRA: a frozen model becomes a mixture of experts, each of which is a LoRA of its feed-forward.

    python train/mixlora_train.py                      two new skills for the fine-tuned model in out/
    python train/mixlora_train.py --set mixlora.num_experts=4 --set mixlora.shared_expert=true --out out/four
    python inference/chat.py --adapter out/TinySeek_MixLora_final.pkl

What makes this stage: its data are those of sft_train.py; its loss is cross-entropy at the answers, and a
balance of the experts; trainable are exactly the routers and the experts' factors (and plain LoRA on
attention), while the base stays as it is, bit by bit; it saves these alone, with a hash of their base.
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

STAGE, SHORT = "mixlora_train", "MixLora"


def main():
    """A router and LoRA experts beside frozen feed-forwards, on dialogues."""
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
