"""Prefix tuning, the smallest adapter: trained keys and values that every token attends to.

    python train/prefix_train.py                                a new skill for the fine-tuned model in out/
    python train/prefix_train.py --set prefix.kind=prompt --out out/prompt     embeddings after the roles
    python inference/chat.py --adapter out/TinySeek_Prefix_final.pkl

What makes this stage: its data and its loss are those of sft_train.py; it trains `prefix.length` keys and
values in every layer (kind `prefix`), or as many embeddings after each role marker (kind `prompt`: System,
User, Assistant); the base stays bit-identical; it saves these alone, with a hash of their base.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from train.engine.fine_tuning import train_adapter
from utils.errors import run_main

STAGE, SHORT = "prefix_train", "Prefix"


def main():
    """Train keys and values before the text, on dialogues."""
    train_adapter(STAGE, SHORT, __doc__)


if __name__ == "__main__":
    run_main(main)
