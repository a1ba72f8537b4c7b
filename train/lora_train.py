"""LoRA: train thin factors beside the frozen matrices of a finished model.

    python train/lora_train.py                                  a new skill for the fine-tuned model in out/
    python train/lora_train.py --data dialogues.jsonl --set lora.r=16 --set lora.use_dora=true --out out/own
    python train/lora_train.py --set lora.base=nf4              beside codes of 4 bits: QLoRA
    python inference/chat.py --adapter out/TinySeek_Lora_final.pkl

What makes this stage: its data and its loss are those of sft_train.py; it trains the factors A and B (and
DoRA's magnitudes) of the layers named in `lora.target_modules`, a few percent of all parameters; the base
stays bit-identical; it saves the factors alone, with a hash of their base.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from train.engine.fine_tuning import train_adapter
from utils.errors import run_main

STAGE, SHORT = "lora_train", "Lora"


def main():
    """Train thin factors beside frozen matrices, on dialogues."""
    train_adapter(STAGE, SHORT, __doc__)


if __name__ == "__main__":
    run_main(main)
