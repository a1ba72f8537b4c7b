"""Masked language modelling: an encoder learns to find the tokens that were taken out of a text.

    python train/mlm_train.py                            learns from the standard library of your Python
    python train/mlm_train.py --config bert              the same with the recipe of BERT
    python train/mlm_train.py --data book.txt --out out/book
    python train/mlm_train.py --init bert.pkl --data book.txt       continues with an imported BERT

What makes this stage: its data are windows of one long row of tokens, some of them masked, different ones
in every epoch (load_data/masking.py); its loss is the cross-entropy of the masked tokens alone
(train/engine/masked_stage.py); all parameters are trainable; it saves the last weights.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from inference.fill_mask import fill, report
from load_data.masking import WRITTEN
from load_data.tokenization.tokenizer import MASK
from model.encoder import MaskedLM
from train.engine.command import chat_command, parse_command
from train.engine.machine import start_machine
from train.engine.masked_stage import masked_stage
from train.engine.text_stage import open_text
from train.engine.trainer import Trainer
from utils.checkpoint import load_weights
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "mlm_train", "MLM"
PYTHON_LINES = [
    "import [MASK]\n",
    "for [MASK] in range([MASK]):\n",
    "class Queue:\n    def __init__([MASK], size):\n        self.size = [MASK]\n",
    "try:\n    value = int(text)\nexcept [MASK]:\n    return [MASK]\n",
]


def main():
    """Train an encoder on plain text, then fill some masks with it."""
    command = parse_command(STAGE, SHORT, __doc__, sections=("encoder",))
    config, machine = command.config, start_machine(command.config)
    data = open_text(command, machine, "encoder", (MASK,))
    model = MaskedLM(config.encoder)
    if command.init:
        load_weights(model, command.init["weights"], "--init")
    stage = masked_stage(STAGE, SHORT, model, data, config, machine)
    found = Trainer(stage, config, machine, command.out, command.resume).run()
    machine.say(f"{found['val_acc']:.1%} of the masked tokens of held-out text are found")
    if machine.world.is_first:
        show_fills(model.eval(), data, config)
        print(f'\nnext: {chat_command(SHORT, command.out)} "import [MASK]"')
    finish()


def show_fills(model, data, config):
    """Print the candidates for some masks."""
    tokenizer, texts = data.tokenizer, PYTHON_LINES
    if "python" not in config.data.paths:
        pieces = [data.val[part * len(data.val) // 4 :][:25] for part in (1, 2, 3)]
        texts = [tokenizer.decode(one[:12]) + WRITTEN + tokenizer.decode(one[13:]) for one in pieces]
    for text in texts:
        print(f"\n--- {WRITTEN} ---\n{report(text, fill(model, tokenizer, text, top=3))}")


if __name__ == "__main__":
    run_main(main)
