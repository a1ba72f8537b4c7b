"""Estimate the parameters, memory, steps and hours of a pre-training run on a GPU that is not here.

    python train/lab/estimate.py --config gpu_base --device H200

On the machine at hand, a run makes its own forecast from its first steps. This script combines the bytes and
FLOPs of the cost card with the GPU's data sheet. A matrix product may reach the GPU's peak; a whole step
reaches a share of it, the model FLOPs utilisation (MFU): 0.21 in GPT-3, 0.46 in PaLM (arXiv 2204.02311, table
3). Small models reach less, since launching a kernel takes 5 to 25 microseconds whatever its size.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import time

import utils  # noqa: F401  sets how threads wait; must precede torch
import torch

from config.load import load_config
from load_data.packing import prepare_pretraining
from model.tinyseek import TinySeek
from train.engine.forecast import SAVING, Costs, duration, end_of_run
from utils.cost import cost_card, size
from utils.device import GPUS, data_sheet
from utils.errors import Parser, UserError, run_main

MFU = 0.35
LAUNCH = 10e-6  # seconds to launch a kernel
KERNELS = 200  # per layer and step without torch.compile: 140 (dense, AdamW) to 300 (experts, Muon)
SPARE = 1e9, 1.1  # bytes for CUDA itself, and the factor by which allocated blocks exceed tensors


def main():
    """Print the estimate."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="NAME|FILE.json", help="preset or JSON file (default: that of pre_train.py)")
    add("--device", metavar="GPU", required=True, help="such as H200, A100 or 4090")
    add("--data", nargs="+", metavar="PATH", help="as in pre_train.py")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings")
    add("--mfu", type=float, default=MFU, help=f"share of the GPU's peak that a step reaches (default {MFU})")
    args = parser.parse_args()
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: must be above 0 and at most 1")
    config = load_config(args.config, args.settings, {}, {"data": {"paths": args.data}} if args.data else {})
    peak, room = data_sheet(f"{args.device} RTX {args.device}")
    if peak is None:
        raise UserError(f"--device {args.device}: unknown; known: {', '.join(GPUS)}")
    if config.train.dtype == "fp32":
        raise UserError("train.dtype=fp32: data sheets give bf16 peaks; leave this setting out")
    clock = time.monotonic()
    data = prepare_pretraining(config)
    print(f"data: read and tokenized in {time.monotonic() - clock:.1f} seconds on this machine")
    config.model.vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    print("\n".join(estimate(config, len(data.val), peak, room, args.mfu)))


def estimate(config, held_out: int, peak: float, room: float, mfu: float) -> list[str]:
    """Return the report on a GPU of `peak` FLOP/s and `room` bytes; an evaluation reads `held_out` tokens."""
    train, length = config.train, config.data.sequence_length
    with torch.device("meta"):
        model = TinySeek(config.model)
    tokens, passes = train.batch_size * length, train.accumulation_steps
    again, kind = train.gradient_checkpointing, torch.bfloat16
    card = cost_card(model, tokens, length, config.optim.optimizer, kind, "cuda", again)
    forwards = 4 if again else 3  # the work of a step, in forward passes: a backward pass is two
    products = passes * card.train_flops() / 3 * forwards * tokens / (mfu * peak)
    launches = passes * config.model.num_hidden_layers * KERNELS / 3 * forwards * LAUNCH * (not train.compile)
    step, batches = max(products, launches), -(-held_out // tokens)
    evaluation = batches * step / passes / forwards
    costs = Costs(step, evaluation, batches, SAVING * card.parameters)
    steps, seconds = end_of_run(train, 0, 0.0, costs)
    needs = SPARE[0] + SPARE[1] * card.peak_bytes
    fits = "fits" if needs <= room else "does not fit: lower train.batch_size"
    speed = passes * tokens / step
    return card.lines() + [
        f"a step      {passes * tokens:,} tokens, {step * 1e3:,.0f} ms, {speed:,.0f} tokens/s "
        f"(products {products * 1e3:,.1f} ms, launches {launches * 1e3:,.1f} ms; the longer counts)",
        f"the run     {steps:,.0f} steps, {duration(seconds)} with evaluations and checkpoints",
        f"peak memory {size(needs)} of {size(room)}, with CUDA itself and 10 % for fragmentation: {fits}",
    ]


if __name__ == "__main__":
    run_main(main)
