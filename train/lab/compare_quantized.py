"""Compare the methods of inference/quantize.py on one trained model: loss, skills, and memory.

    python train/lab/compare_quantized.py                               the latest pre-trained model in out/
    python train/lab/compare_quantized.py --checkpoint out/TinySeek_SFT_final.pkl --png docs/quantized.png
    python train/lab/compare_quantized.py --methods rtn8,gptq4,nf4

Each model is quantised, saved and loaded again, and what was loaded is measured: the memory of all tensors
that it holds, the file, and bits per byte on all held-out text (of a model that answers: on the held-out
answers, with the mean score of the skills). Bits per weight count the matrices that were quantised.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import math
import tempfile
from pathlib import Path
from statistics import mean

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
import torch
from matplotlib.figure import Figure

from config.quant import CALIBRATED, QuantConfig
from inference.evaluate import score_skills
from inference.generation.generator import Generator
from inference.generation.load import DEFAULT_OUT, Loaded, load_full
from inference.quantization.calibrate import training_rows
from inference.quantize import MIB, contents, quantized, refuse_quantized
from load_data.chat.chat_data import prepare_chat
from load_data.chat.chat_loader import eval_chat_batches
from load_data.loader import eval_windows
from load_data.packing import prepare_pretraining
from load_data.skills import SFT_SKILLS
from model.quantized import held_bytes
from utils.checkpoint import final_name, save_checkpoint
from utils.device import set_threads
from utils.errors import Parser, UserError, run_main
from utils.plot import COLORS, save_figure

FORMATS = {
    "rtn8": QuantConfig("rtn", 8),
    "smoothquant8": QuantConfig("smoothquant", 8),
    "rtn4": QuantConfig("rtn", 4, 32),
    "rtn4-64": QuantConfig("rtn", 4, 64),
    "rtn4-asym": QuantConfig("rtn", 4, 32, symmetric=False),
    "gptq4": QuantConfig("gptq", 4, 32),
    "gptq4-64": QuantConfig("gptq", 4, 64),
    "gptq4-asym": QuantConfig("gptq", 4, 32, symmetric=False),
    "awq4": QuantConfig("awq", 4, 32),
    "awq4-asym": QuantConfig("awq", 4, 32, symmetric=False),
    "nf4": QuantConfig("nf4", 4),
    "nf4-double": QuantConfig("nf4", 4, double_quant=True),
    "rtn8-head": QuantConfig("rtn", 8, head=True),
}
BATCH = 8  # rows


@torch.inference_mode()
def bits_per_byte(loaded: Loaded) -> float:
    """Return the loss on all held-out text, or on the held-out answers of a model that answers."""
    config, tokenizer = loaded.config, loaded.tokenizer
    length = config.data.sequence_length
    if loaded.answers:
        rows = prepare_chat(config, tokenizer).val
        batches = eval_chat_batches(rows, length, BATCH, pad_id=tokenizer.pad_id)
    else:
        batches = eval_windows(prepare_pretraining(config, tokenizer).val, length, BATCH)
    nats, size, token_bytes = 0.0, 0, torch.from_numpy(tokenizer.token_bytes.astype("int64"))
    for batch in batches:
        nats += loaded.model(**batch).loss_sum.item()
        size += token_bytes[batch["labels"][batch["labels"] >= 0]].sum().item()
    return nats / math.log(2) / size


def measured(loaded: Loaded, count: int) -> tuple[float, float, float]:
    """Return MiB of weights, bits per byte, and the mean score of the skills (NaN for one that continues)."""
    skills = math.nan
    if loaded.answers and count:
        generator, rule = Generator(loaded.model, loaded.tokenizer.eos_id), loaded.config.data.val_fraction
        scores = score_skills(generator, loaded.template, SFT_SKILLS, count, rule)
        skills = mean(score.percent for score in scores.values())
    return held_bytes(loaded.model) / MIB, bits_per_byte(loaded), skills


def quantized_row(path: Path, name: str, batches: list[dict], count: int) -> tuple:
    """Return the row of a method: bits per weight, MiB of weights and of the file, loss, and skills."""
    loaded, quant = load_full(path), FORMATS[name]
    rows = quantized(loaded, quant, batches if quant.method in CALIBRATED else [])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.pkl"
        save_checkpoint(file, contents(loaded))
        size = file.stat().st_size / MIB
        held, bpb, skills = measured(load_full(file), count)
    bits = 8 * sum(row.after for row in rows) / sum(row.numbers for row in rows)
    return bits, held, size, bpb, skills


def plot(rows: dict[str, tuple], png: str) -> None:
    """Draw the loss over the bits per weight; a line is the loss in full precision."""
    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(rows["fp32"][3], color="grey", linestyle="--")
    axes.annotate("fp32", (6, rows["fp32"][3]), xytext=(0, 4), textcoords="offset points", color="grey")
    for number, (name, (bits, _, _, bpb, _)) in enumerate(one for one in rows.items() if one[0] != "fp32"):
        axes.plot(bits, bpb, color=COLORS[number % len(COLORS)], marker="o")
        left, height = bits < 4.4, 2 if number % 2 else -9  # so that few names overlap
        axes.annotate(name, (bits, bpb), textcoords="offset points", ha="right" if left else "left",
                      xytext=(-7 if left else 7, height))  # fmt: skip
    axes.set(xlabel="bits per quantised weight, scales included", ylabel="held-out loss in bits per byte")
    axes.set_xlim(3.5, 9)
    axes.grid(alpha=0.3)
    save_figure(figure, png)


def main():
    """Measure each method in turn, print the table and draw the picture."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", default=DEFAULT_OUT / final_name("Pre"), help="the model")
    add("--methods", metavar="A,B", default=",".join(FORMATS), help="default: %(default)s")
    add("--rows", type=int, default=128, metavar="N", help="of calibration (default: %(default)s)")
    add("--count", type=int, default=100, metavar="N", help="questions of each skill (default: %(default)s)")
    add("--png", metavar="FILE", help="draw loss over bits per weight")
    args = parser.parse_args()
    names = args.methods.split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        raise UserError(f"--methods {unknown[0]}: known are {', '.join(FORMATS)}")
    if args.rows < 1 or args.count < 0:
        raise UserError("--rows must be at least 1, and --count at least 0")
    set_threads()
    full = load_full(args.checkpoint)
    refuse_quantized(full)
    batches = training_rows(full, None, args.rows)
    held, *scores = measured(full, args.count)
    rows = {"fp32": (32.0, held, full.path.stat().st_size / MIB, *scores)}
    print("| | bits per weight | MiB of weights | of the file | bits per byte | more than fp32 | skills |")
    print("| --- |" + " ---: |" * 6)
    for name in ("fp32", *names):
        if name != "fp32":
            rows[name] = quantized_row(args.checkpoint, name, batches, args.count)
        bits, held, size, bpb, skills = rows[name]
        scored = "" if math.isnan(skills) else f"{skills:.1f}"
        print(f"| {name} | {bits:.3f} | {held:.2f} | {size:.2f} | {bpb:.4f} | {bpb - rows['fp32'][3]:+.4f} | "
              f"{scored} |", flush=True)  # fmt: skip
    if args.png:
        plot(rows, args.png)


if __name__ == "__main__":
    run_main(main)
