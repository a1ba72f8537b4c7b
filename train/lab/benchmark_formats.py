"""Measure decoding with quantised weights against fp32: tokens per second and memory, on a CPU.

    python train/lab/benchmark_formats.py                   the default model, and 1,024 wide with 8 layers
    python train/lab/benchmark_formats.py --only large --turns 10 --png formats.png

Weights are random. Each format and fp32 take turns, and the ratio is the median over turns (shared machines
are noisy). A turn is 16 tokens in each of 1 and of 16 rows. Memory is what the process grew by, in MB: first
by the model, then by the fast decoder's own form of it. The picture shows both against each other.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import ctypes
import gc
import statistics
from pathlib import Path

import utils  # noqa: F401  sets how threads wait; must precede torch
import torch

from config.load import load_config
from config.quant import QuantConfig
from inference.generation.generator import Generator
from model.caches import make_cache
from model.quantized import quantize_weights
from model.tinyseek import TinySeek
from train.engine.machine import start_machine
from train.lab.benchmark import ratio, take_turns
from utils.errors import Parser, UserError, run_main
from utils.plot import COLORS, make_panels, save_figure

FORMATS = {
    "fp32": {},
    "int8": {"method": "rtn", "bits": 8},
    "int8, inputs too": {"method": "smoothquant", "bits": 8},
    "int4, groups of 32": {"method": "rtn", "bits": 4, "group_size": 32},
    "int4, groups of 64": {"method": "rtn", "bits": 4, "group_size": 64},
    "nf4": {"method": "nf4", "bits": 4},
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
         "intermediate_size": 2816, "n_routed_experts": 0}  # fmt: skip
SHAPES = {"default": {}, "large": LARGE}
ROWS, NEW_TOKENS = (1, 16), 16


def main():
    """Print one table for each shape."""
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--turns", type=int, default=5, help="of each format (default 5)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw gain over memory")
    args = parser.parse_args()
    if args.turns < 1:
        raise UserError("--turns must be at least 1")
    found = {}
    for name, shape in SHAPES.items():
        if args.only in (None, name):
            changes = [f"model.{key}={value}" for key, value in shape.items()]
            config = load_config("laptop", ["train.dtype=fp32", "train.device=cpu", *changes])
            config.model.vocab_size = config.tokenizer.vocab_size
            found[name] = compare(config.model, args.turns, start_machine(config))
    if args.png:
        plot(found, args.png)


def resident() -> float:
    """Return the memory that this process occupies now, in MB; 0 where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    if not status.is_file():
        return 0.0
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # give back what is free
    return next(int(line.split()[1]) for line in status.open() if line.startswith("VmRSS")) / 1000


def decoding(generator: Generator, rows: int):
    """Return a call that decodes `NEW_TOKENS` tokens of each row."""
    decoder, ids = generator.fast_decoder(rows), torch.ones(rows, 1, dtype=torch.long)
    cache = make_cache(generator.model, rows, NEW_TOKENS)

    @torch.inference_mode()
    def call():
        cache.lengths = [0] * rows
        for _ in range(NEW_TOKENS):
            generator.forward(ids, cache, None, decoder=decoder)

    return call


def compare(config, turns: int, machine) -> dict[str, tuple[float, list[float]]]:
    """Print the memory of each format, its speed, and the ratio to fp32; return MB and ratios of each."""
    print(f"{config.hidden_size} wide, {config.num_hidden_layers} layers")
    reference, points = None, {}
    for name, quant in FORMATS.items():
        torch.manual_seed(0)
        generator = contenders = None  # frees the one before
        before, generator = resident(), Generator(TinySeek(config).eval())
        if quant:
            quantize_weights(generator.model, QuantConfig(**quant))
        loaded = resident()
        generator.fast_decoder()
        line = f"  {name:20s} {loaded - before:5.0f} MB, decoder {resident() - loaded:5.0f} MB"
        reference, points[name] = reference or generator, (loaded - before, [])
        for rows in ROWS:
            contenders = {"ours": decoding(generator, rows), "fp32": decoding(reference, rows)}
            times = take_turns(contenders, turns, machine)
            speed = rows * NEW_TOKENS / statistics.median(times["ours"])
            gain = ratio(times["ours"], times["fp32"])
            points[name][1].append(gain)
            line += f"   {rows:2d} rows: {speed:7,.1f} tokens/s, ratio {gain:.2f}"
        print(line, flush=True)
    return points


def plot(found: dict[str, dict[str, tuple[float, list[float]]]], png: Path) -> None:
    """Draw for each shape the speed of each format against fp32 over the memory of the model."""
    figure, panels = make_panels(len(found), 5.5, 4.0)
    for axes, (shape, points) in zip(panels, found.items(), strict=True):
        for color, (name, (size, gains)) in zip(COLORS, points.items(), strict=False):
            for marker, gain in zip("os", gains, strict=True):
                axes.plot(size, gain, marker, color=color, label=name if marker == "o" else None)
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.set(xlabel="MB of the model", ylabel="tokens/s against fp32",
                 title=f"{shape} shape: 1 row (circles), 16 rows (squares)")  # fmt: skip
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, png)


if __name__ == "__main__":
    run_main(main)
