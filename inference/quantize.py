"""Quantise a trained model: its matrices become integers of 8 or 4 bits, in a checkpoint that chat loads.

    python inference/quantize.py                                  the latest model in out/, to 8 bits
    python inference/quantize.py --method gptq --bits 4           4 bits, fitted to what the layers read
    python inference/quantize.py --method nf4 --double --checkpoint FILE --to small.pkl

Methods: rtn (round to nearest), gptq and awq (4 or 8 bits, calibrated), smoothquant (8 bits, inputs rounded
too), nf4 (16 levels for normal numbers). Calibration reads training data: that of the model, or the training
side of `--data`. 4 bits have a scale for each group of 32 numbers, 8 bits one for each row.

The table shows each kind of layer: bits per weight, memory before and after, as held, and the errors of the
weights and of the outputs, relative to their size. What stays in full precision comes with the reason.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import mean

from tqdm import tqdm

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from config.checks import validate_section
from config.load import to_dict
from config.quant import CALIBRATED, METHODS, QuantConfig
from inference.generation.load import DEFAULT_OUT, Loaded, load_base
from inference.generation.terminal import closed_pipe_ends, open_streams, tell
from inference.quantization.calibrate import training_rows
from inference.quantization.fit import Row, quantize_model
from model.blank import blank
from model.quantized import held_bytes, on_stores, stays
from model.tinyseek import TinySeek
from utils.checkpoint import save_checkpoint
from utils.device import set_threads
from utils.errors import Parser, UserError, end_cleanly, run_main

BITS = {"rtn": 8, "smoothquant": 8}  # without --bits; the other methods: 4
GROUP = 32  # without --group, at 4 bits
MIB = 2**20


def parse_command():
    """Return the flags, and the format that they name."""
    parser = Parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    source.add_argument("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    add("--method", choices=METHODS[1:], default="rtn", help="default: %(default)s")
    add("--bits", type=int, metavar="N", help="8 or 4 (default: 8 for rtn and smoothquant, 4 for others)")
    add("--group", type=int, metavar="N", help="numbers of a row that share a scale; 0 for the whole row")
    add("--asymmetric", action="store_true", help="groups have a zero point too")
    add("--double", action="store_true", help="nf4: scales in 8 bits as well")
    add("--head", action="store_true", help="embedding and output head too, in 8 bits")
    add("--data", nargs="+", metavar="PATH", help="calibrate on training data of these, not the model's")
    add("--rows", type=int, default=128, metavar="N", help="of calibration (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of rows (default: %(default)s)")
    add("--to", metavar="FILE", type=Path, help="the file to write (default: named after model and method)")
    add("--overwrite", action="store_true", help="replace the file if there is one")
    args = parser.parse_args()
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must be at least 0")
    bits = BITS.get(args.method, 4) if args.bits is None else args.bits
    group = args.group or None  # 0 is the whole row
    if args.group is None and bits == 4 and args.method != "nf4":
        group = GROUP
    quant = QuantConfig(args.method, bits, group, not args.asymmetric, args.double, head=args.head)
    validate_section("quant", quant)
    if args.data and quant.method not in CALIBRATED:
        raise UserError(f"--data is for calibration, and --method {quant.method} has none: leave it out")
    return args, quant


def refuse_quantized(loaded: Loaded) -> None:
    """Raise `UserError` if the model is quantised already: its exact weights are gone."""
    if (was := loaded.config.quant).method != "none":
        raise UserError(f"{loaded.path} is quantised already ({was.method}): name the model it was made from")


def quantized(loaded: Loaded, quant: QuantConfig, batches: list[dict]) -> list[Row]:
    """Quantise the model in place, with a bar of progress; return the rows of the table."""
    layers = loaded.model.config.num_hidden_layers
    with tqdm(total=2 * layers * len(batches), desc=quant.method, unit="batch", disable=None) as bar:
        rows = quantize_model(loaded.model, quant, batches, bar.update)
    loaded.config = replace(loaded.config, quant=quant)
    return rows


def contents(loaded: Loaded) -> dict:
    """Return the checkpoint of a quantised model: that of its source with other weights and settings."""
    kept = ("stage", "short", "tokenizer", "data_digest", "step", "tokens")
    about = {key: loaded.about[key] for key in kept if key in loaded.about}
    about |= {"config": to_dict(loaded.config), "source": str(loaded.path), "base": None}
    return about | {"weights": loaded.model.state_dict()}


def table(rows: list[Row], model: TinySeek, quant: QuantConfig) -> list[str]:
    """Return the lines of the report: kinds of layers, and what stays as it is."""
    form = f"{quant.method}, {quant.bits} bits"
    form += f", groups of {quant.group_size}" if quant.group_size else ""
    form += ", zero points" if not quant.symmetric else ""
    form += ", scales in 8 bits" if quant.double_quant else ""
    kinds, stay = defaultdict(list), defaultdict(list)
    for row in rows:
        kinds[re.sub(r"\.\d+\.", ".*.", row.path)].append(row)
    for name, weight in model.named_parameters():
        if why := stays(name):
            stay[why].append((name.removesuffix(".weight").split(".")[-1], weight.nbytes))
    names = {why: ", ".join(dict.fromkeys(name for name, _ in parts)) for why, parts in stay.items()}
    wide = max(map(len, (form, *kinds, *names.values())))
    lines = [f"{form:{wide}} layers  bits per weight  MiB before    after  error of weights  of outputs"]
    for kind, group in kinds.items():
        before, after = sum(row.before for row in group), sum(row.after for row in group)  # bytes
        bits = 8 * after / sum(row.numbers for row in group)
        outputs = [row.output_error for row in group if row.output_error is not None]
        line = f"{kind:{wide}} {len(group):6} {bits:16.3f} {before / MIB:11.3f} {after / MIB:8.3f} "
        line += f"{mean(row.weight_error for row in group):17.2%} "
        line += f"{mean(outputs):11.2%}" if outputs else f"{'-':>11}"
        if unseen := sum(row.unseen for row in group):
            line += f"   {unseen} experts saw no token: rounded to nearest"
        lines.append(line)
    lines.append("in full precision:")
    for why, parts in stay.items():
        size = sum(size for _, size in parts) / MIB
        lines.append(f"{names[why]:{wide}} {len(parts):6} {32:16.3f} {size:11.3f} {size:8.3f}  {why}")
    return lines


@closed_pipe_ends()
def main():
    """Load the model, quantise it, write it and print the table."""
    open_streams()
    args, quant = parse_command()
    end_cleanly()
    set_threads()
    loaded = load_base(args.checkpoint, "cpu", args.out, tell=tell)
    refuse_quantized(loaded)
    to = args.to or loaded.path.with_name(f"TinySeek_{loaded.about['short']}_{quant.method}{quant.bits}.pkl")
    if to.is_dir():
        raise UserError(f"--to {to} is a folder: name a file in it")
    if to.exists() and (not args.overwrite or to.samefile(loaded.path)):
        raise UserError(f"{to} is there already; --overwrite replaces it, --to FILE writes elsewhere")
    blank(partial(on_stores, quant), loaded.model.config, "meta")  # an error if the format does not fit
    batches = []
    if quant.method in CALIBRATED:
        batches = training_rows(loaded, args.data, args.rows, args.seed)
    before = held_bytes(loaded.model)
    rows = quantized(loaded, quant, batches)
    save_checkpoint(to, contents(loaded))
    print("\n".join(table(rows, loaded.model, quant)))
    after, files = held_bytes(loaded.model), [path.stat().st_size / MIB for path in (loaded.path, to)]
    print(f"weights in memory: {before / MIB:.2f} -> {after / MIB:.2f} MiB ({after / before:.0%}); "
          f"files: {files[0]:.2f} -> {files[1]:.2f} MiB")  # fmt: skip
    tell(f"saved {to}; talk to it with python inference/chat.py --checkpoint {quote(str(to))}")


if __name__ == "__main__":
    run_main(main)
