"""Measure how far a model reads: its loss by position, and what it recalls from far above.

    python inference/long_context.py                           the latest model, up to 8 times its length
    python inference/long_context.py --methods plain,yarn,dca  by several methods, without training
    python inference/long_context.py --checkpoint out/TinySeek_Pre_final.pkl --tasks passkey,keys,names

Methods are those of config/extension.py; `plain` reads on beyond the trained length as it is. The tables go
to the terminal, and pictures to `long_context/` beside the model: `loss.png`, and a heat map of length and
depth for each task (inference/context/tasks.py).
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

from dataclasses import replace

import numpy as np
from tqdm import tqdm

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from config.extension import METHODS, stretched
from inference.context.measure import loss_by_position, recall_grid
from inference.context.tasks import TASKS, Haystack
from inference.generation.load import DEFAULT_OUT, load_base
from inference.generation.terminal import closed_pipe_ends, open_streams, tell
from load_data.packing import prepare_pretraining
from model.quantized import on_stores
from model.tinyseek import TinySeek
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main
from utils.plot_context import plot_losses, plot_recall

TIMES = (1, 2, 4, 8)  # default lengths, in trained lengths


def with_config(model: TinySeek, config, quant) -> TinySeek:
    """Return a copy of `model` with the weights of `model` and another configuration."""
    copy = on_stores(quant, config)
    copy.load_state_dict(model.state_dict())
    return copy.to(model.model.norm.weight.device).eval()


def parse_command():
    """Return the flags, checked."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    add("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    add("--lengths", metavar="N,N", help="tokens (default: 1, 2, 4 and 8 times the trained length)")
    add("--methods", metavar="A,B", default="plain", help=f"of {','.join(METHODS)} (default: %(default)s)")
    add("--tasks", metavar="A,B", default="passkey", help=f"of {','.join(TASKS)} (default: %(default)s)")
    add("--data", nargs="+", metavar="PATH", help="held-out text of these (default: the model's own)")
    add("--count", type=int, default=20, metavar="N", help="items per cell of a table (default: %(default)s)")
    add("--depths", type=int, default=5, metavar="N", help="depths from 0 to 1 (default: %(default)s)")
    add("--windows", type=int, default=32, metavar="N", help="windows for the loss (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the items (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    for name, known in (("methods", METHODS), ("tasks", TASKS)):
        values = getattr(args, name).split(",")
        if wrong := [value for value in values if value not in known]:
            raise UserError(f"--{name} {','.join(wrong)}: known are {', '.join(known)}")
        setattr(args, name, values)
    for name in ("count", "depths", "windows"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    return args


def chosen_lengths(text: str | None, trained: int) -> list[int]:
    """Return the lengths of `--lengths`, sorted, or the default ones."""
    if text is None:
        return [trained * times for times in TIMES]
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 2:
        raise UserError(f"--lengths {text}: give whole numbers of at least 2, for example 512,1024")
    return lengths


@closed_pipe_ends()
def main():
    """Load the model, measure it by each method, print the tables and draw the pictures."""
    open_streams()
    args = parse_command()
    device = pick_device(args.device)
    set_threads()
    loaded = load_base(args.checkpoint, device, args.out, tell=tell)
    config, trained = loaded.config, loaded.config.model.max_position_embeddings
    lengths = chosen_lengths(args.lengths, trained)
    data = replace(config, data=replace(config.data, paths=args.data or config.data.paths))
    tokens = prepare_pretraining(data, loaded.tokenizer).val
    if lengths[-1] >= len(tokens):
        raise UserError(f"--lengths {lengths[-1]}: there are only {len(tokens)} tokens of held-out text")
    haystack = Haystack(tokens, loaded.tokenizer)
    depths = [depth / max(1, args.depths - 1) for depth in range(args.depths)]
    tell(f"{loaded.path}: trained on {trained} tokens; {len(tokens):,} tokens of held-out text")
    losses, grids = {}, {task: {} for task in args.tasks}
    cells = len(args.methods) * len(args.tasks) * len(lengths) * len(depths)
    with tqdm(total=cells, desc="recall", disable=None) as bar:
        for method in args.methods:
            model = loaded.model
            if method != "plain" or lengths[-1] > trained:
                model = with_config(model, stretched(config.model, method, lengths[-1]), config.quant)
            losses[method] = loss_by_position(model, tokens, lengths[-1], args.windows).numpy()
            for task in args.tasks:
                sizes = (lengths, depths, args.count, args.seed, bar.update)
                grids[task][method] = recall_grid(model, haystack, task, *sizes)
    print("\n".join(report(losses, grids, lengths, depths)))
    folder = loaded.path.parent / "long_context"
    folder.mkdir(exist_ok=True)
    plot_losses(losses, trained, folder / "loss.png")
    for task, by_method in grids.items():
        plot_recall(by_method, lengths, depths, f"{task}: percent recalled", folder / f"{task}.png")
    tell(f"pictures: {folder}")


def report(losses, grids, lengths, depths) -> list[str]:
    """Return the lines of the tables: loss between lengths, and recall by length and depth."""
    spans = list(zip([0, *lengths[:-1]], lengths, strict=True))
    heads = "".join(f"{f'{a}-{b}':>14}" for a, b in spans)
    lines = ["loss (nats per token) by position", " " * 12 + heads]
    for method, curve in losses.items():
        lines.append(f"{method:12}" + "".join(f"{np.mean(curve[a:b]):14.3f}" for a, b in spans))
    for task, by_method in grids.items():
        heads = "".join(f"{depth:6.0%}" for depth in depths)
        lines += ["", f"{task}: percent recalled", f"{'':12}{'tokens':>8}  depth" + heads]
        for method, grid in by_method.items():
            for length, row in zip(lengths, grid, strict=True):
                lines.append(f"{method:12}{length:8}       " + "".join(f"{percent:6.0f}" for percent in row))
    return lines


if __name__ == "__main__":
    run_main(main)
