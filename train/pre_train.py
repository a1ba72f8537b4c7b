"""Pre-training: a decoder learns to predict the next token of plain text.

    python train/pre_train.py                            learns from the standard library of your Python
    python train/pre_train.py --data book.txt            learns from your own text
    python train/pre_train.py --config shakespeare --data input.txt --max-seconds 180

What makes this stage: its data are windows of one long row of tokens; its loss is the cross-entropy of every
token (and, where the model has them, the balance of experts and the loss of a second head:
train/engine/language_model_loss.py); all parameters are trainable; it saves the last weights.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.tinyseek import TinySeek
from modules.experts.balance import max_vio
from train.engine.command import chat_command, parse_command
from train.engine.trainer import Trainer
from train.engine.machine import start_machine
from train.engine.text_stage import open_text, text_stage
from utils.checkpoint import load_weights
from utils.distributed import finish
from utils.errors import run_main
from utils.plot_experts import plot_expert_load, plot_expert_tokens

STAGE, SHORT = "pre_train", "Pre"
PYTHON_PROMPTS = ["def read_lines(path):\n", "import os\nimport sys\n\nclass ", ">>> 12 + 7\n"]


def main():
    """Train a model on plain text, then print samples."""
    command = parse_command(STAGE, SHORT, __doc__)
    config, machine = command.config, start_machine(command.config)
    data = open_text(command, machine)
    model = TinySeek(config.model)
    if command.init:
        load_weights(model, command.init["weights"], "--init")
    stage = text_stage(STAGE, SHORT, model, data, config, machine)
    Trainer(stage, config, machine, command.out, command.resume).run()
    if machine.world.is_first:
        show_experts(stage.evaluate, command.out / STAGE)
        show_samples(model, data, config)
        print(f'\nnext: {chat_command(SHORT, command.out)} --prompt "def "')
    finish()


def show_experts(evaluation, folder):
    """Plot the load of each expert: over training, and by kind of token on held-out data."""
    if (folder / "experts.txt").exists():
        plot_expert_load(folder / "experts.txt", folder / "experts.png")
    if evaluation.loads is None:
        return
    layers = evaluation.loads.sum(dim=1)  # (layers, E)
    vio = "  ".join(f"{max_vio(layer):.2f}" for layer in layers)
    print(f"experts on held-out data: max_vio by layer  {vio}   dead {int((layers == 0).sum())}")
    shares = evaluation.loads / evaluation.loads.sum(dim=2, keepdim=True)  # rows sum to 1; NaN: no such token
    plot_expert_tokens(shares.numpy(), evaluation.kinds, folder / "expert_tokens.png")


def show_samples(model, data, config):
    """Print a few continuations."""
    tokenizer = data.tokenizer
    prompts = PYTHON_PROMPTS
    if "python" not in config.data.paths:
        places = [len(data.val) * part // 4 for part in (1, 2, 3)]
        prompts = [tokenizer.decode(data.val[place : place + 24]) for place in places]
    params = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=64, seed=0)
    generator = Generator(model)
    room = generator.room(params.max_new_tokens)
    ids = [one[-room:] for one in tokenizer.encode_open(prompts)]
    answers = generator.generate(ids, params, stop_ids={tokenizer.eos_id})
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"\n--- sample ---\n{prompt}|{tokenizer.decode(answer)}")


if __name__ == "__main__":
    run_main(main)
