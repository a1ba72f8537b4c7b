"""Measure what a long context costs: speed and memory of prefill and of decoding, by length and by method.

    python train/lab/context_cost.py --config dense                          up to 32,768 tokens, four methods
    python train/lab/context_cost.py --config laptop --lengths 1024,8192 --methods plain,dca

The weights are random: they change neither time nor memory. Prefill reads the whole prompt at once; decoding
adds `NEW` tokens to it, one at a time. The cache is what `model/caches.py` allocates for that row, and the
peak is that of all tensors during prefill, as PyTorch's profiler counts them. `pattern` makes every fourth
layer global and gives the others a window of the trained length.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import gc
import time
from dataclasses import replace

import utils  # noqa: F401  sets how threads wait; must precede torch
import torch
from torch.profiler import ProfilerActivity, profile

from config.extension import METHODS, stretched
from config.load import load_config
from model.caches import make_cache
from model.tinyseek import TinySeek
from train.engine.machine import start_machine
from utils.errors import Parser, UserError, run_main

LENGTHS = "1024,4096,16384,32768"
NEW = 16  # tokens to decode
PATTERN = "pattern"
MIB = 2**20


def configured(model, method: str, length: int):
    """Return the configuration of `model` by `method`, for `length` tokens and the new ones."""
    places = max(length + NEW, model.max_position_embeddings + 1)
    if method == PATTERN:
        window = model.max_position_embeddings
        settings = {"sliding_window": window, "sliding_window_pattern": 4, "max_position_embeddings": places}
        model = replace(model, **settings)
        model.check()
        return model
    return stretched(model, method, places)


@torch.inference_mode()
def measure(model: TinySeek, length: int, machine) -> tuple[float, float, float, float]:
    """Return tokens per second of prefill and of decoding, and the MiB of the cache and of the peak."""
    ids = torch.randint(model.config.vocab_size, (1, length + NEW), device=machine.device)
    cache = make_cache(model, 1, length + NEW)
    with machine.autocast():
        start = time.perf_counter()
        model(ids[:, :length], cache=cache, last_only=True)
        middle = time.perf_counter()
        for place in range(length, length + NEW):
            model(ids[:, place : place + 1], cache=cache, last_only=True)
        end = time.perf_counter()
    speeds = length / (middle - start), NEW / (end - middle)
    return *speeds, cache.bytes / MIB, peak(model, ids[:, :length], machine)


def peak(model: TinySeek, ids, machine) -> float:
    """Return the MiB of all tensors that a prefill of `ids` (1, T) holds at its peak, the cache included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, machine.autocast():
        model(ids, cache=make_cache(model, 1, ids.shape[1] + NEW), last_only=True)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / MIB


def main():
    """Measure each method at each length and print a table."""
    parser, known = Parser(__doc__), (*METHODS, PATTERN)
    add = parser.add_argument
    add("--config", default="dense", help="a preset or JSON file (default: %(default)s)")
    add("--lengths", default=LENGTHS, help="tokens of the prompt (default: %(default)s)")
    add("--methods", default="plain,yarn,dca,window,pattern", help=f"some of {','.join(known)}")
    args = parser.parse_args()
    if wrong := [method for method in args.methods.split(",") if method not in known]:
        raise UserError(f"--methods {','.join(wrong)}: known are {', '.join(known)}")
    if not all(part.isdigit() and int(part) > 0 for part in args.lengths.split(",")):
        raise UserError(f"--lengths {args.lengths}: give whole numbers above 0, for example {LENGTHS}")
    config = load_config(args.config)
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    machine = start_machine(config)
    print(f"{'method':10}{'tokens':>8}{'prefill/s':>11}{'decode/s':>10}{'cache MiB':>11}{'peak MiB':>10}")
    for length in map(int, args.lengths.split(",")):
        for method in args.methods.split(","):
            torch.manual_seed(0)
            model = TinySeek(configured(config.model, method, length)).to(machine.device).eval()
            prefill, decode, *sizes = measure(model, length, machine)
            numbers = f"{prefill:11,.0f}{decode:10,.0f}{sizes[0]:11,.1f}{sizes[1]:10,.1f}"
            print(f"{method:10}{length:8,}{numbers}", flush=True)


if __name__ == "__main__":
    run_main(main)
