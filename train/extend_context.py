"""Context extension: a trained model learns to read several times as far, in a short second training.

    python train/extend_context.py                               out/TinySeek_Pre_final.pkl, 4 times, ABF
    python train/extend_context.py --set extend.method=yarn --set extend.times=8
    python inference/long_context.py --checkpoint out/TinySeek_Long_final.pkl     measures how far it reads

What makes this stage: its data are the same text as in pre-training, in rows of the new length, with files
that ask for lines far above (load_data/corpora/recall.py), since ordinary text seldom does; its loss is the
cross-entropy of every token; all parameters are trainable, with new rotary frequencies (config/extension.py);
it saves the last weights.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from config.extension import stretched
from load_data.packing import prepare_pretraining
from train.engine.command import parse_command
from train.engine.fine_tuning import open_base
from train.engine.machine import start_machine
from train.engine.text_stage import text_stage
from train.engine.trainer import Trainer
from utils.checkpoint import final_name
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "extend_context", "Long"


def main():
    """Train all weights of the base on rows of the new length."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("Pre",))
    config, trained = command.config, command.config.model.max_position_embeddings
    config.data.sequence_length = length = trained * config.extend.times
    config.model = stretched(config.model, config.extend.method, length)
    machine = start_machine(config)
    base = open_base(command, machine)
    machine.say(f"context: {trained} -> {length} tokens by {config.extend.method}")
    data = machine.read(prepare_pretraining, config, base.tokenizer)
    machine.say("\n".join(data.summary))
    stage = text_stage(STAGE, SHORT, base.model, data, config, machine)
    Trainer(stage, config, machine, command.out, command.resume).run()
    machine.say(f"\nnext: python inference/long_context.py --checkpoint {command.out / final_name(SHORT)}")
    finish()


if __name__ == "__main__":
    run_main(main)
