"""Measure batched sampling, as in rollouts, against `generate` of a Hugging Face model of the same shape.

    python train/lab/benchmark_sampling.py                      64 rows of 64 tokens, the default model
    python train/lab/benchmark_sampling.py --config dense --turns 20

Prompts have 16 random tokens, and no row ends early. The contenders take turns (train/lab/benchmark.py):
ours, ours with log-probabilities and experts recorded, ours on 8 prompts with 8 samples each, and the twin,
which draws from the same distribution: temperature 1 and no filter. Needs `transformers`.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import functools

import utils  # noqa: F401  sets how threads wait; must precede torch
import torch

from config.load import load_config
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.tinyseek import TinySeek
from train.engine.machine import start_machine
from train.lab.benchmark import PROMPT, hugging_face_twin, report, take_turns, twin_kind
from utils.errors import Parser, UserError, run_main
from utils.products import multiply_with

ROWS, NEW_TOKENS, SAMPLES = 64, 64, 8


def main():
    """Print one table."""
    parser = Parser(__doc__)
    parser.add_argument("--config", default="laptop", metavar="NAME|FILE.json")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="settings")
    parser.add_argument("--turns", type=int, default=10, help="of each contender (default 10)")
    args = parser.parse_args()
    if args.turns < 1:
        raise UserError("--turns must be at least 1")
    config = load_config(args.config, ["train.dtype=fp32", *args.settings])
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    if not twin_kind(config.model):
        raise UserError(f"--config {args.config}: transformers has no model of this shape, or is missing")
    machine = start_machine(config)
    model = TinySeek(config.model).to(machine.device).eval()
    twin = hugging_face_twin(config, "sdpa").to(machine.device).eval()
    ids = torch.randint(0, config.model.vocab_size, (ROWS, PROMPT), device=machine.device)
    params, sample = SamplingParams(max_new_tokens=NEW_TOKENS), Generator(model).generate
    rows = ids.tolist()
    contenders = {
        "TinySeek": functools.partial(sample, rows, params),
        "TinySeek, recorded": functools.partial(sample, rows, params, record=True),
        "TinySeek, 8 prompts": functools.partial(sample, rows[::SAMPLES], params, samples=SAMPLES),
        f"{type(twin).__name__}.generate": torch.inference_mode()(functools.partial(
            twin.generate, ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, eos_token_id=None, pad_token_id=0, min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )),
    }  # fmt: skip
    print(f"sampling, {ROWS} rows, {PROMPT} + {NEW_TOKENS} tokens, {machine.dtype}")
    with multiply_with(machine.products):
        report(take_turns(contenders, args.turns, machine), ROWS * NEW_TOKENS, "tokens/s")


if __name__ == "__main__":
    run_main(main)
