"""MixLoRA: a frozen model becomes a mixture of experts, each of which is a LoRA of its feed-forward.

    python train/mixlora_train.py                      two new skills for the fine-tuned model in out/
    python train/mixlora_train.py --set mixlora.num_experts=4 --set mixlora.shared_expert=true --out out/four
    python inference/chat.py --adapter out/TinySeek_MixLora_final.pkl

What makes this stage: its data are those of sft_train.py; its loss is the cross-entropy of the answers and
the balance of experts; it trains the routers, the factors of the experts and plain LoRA on attention; the
base stays bit-identical; it saves the trained weights alone, with a hash of their base.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from train.engine.fine_tuning import train_adapter
from utils.errors import run_main

STAGE, SHORT = "mixlora_train", "MixLora"


def main():
    """Train a router and LoRA experts beside frozen feed-forwards, on dialogues."""
    train_adapter(STAGE, SHORT, __doc__)


if __name__ == "__main__":
    run_main(main)
