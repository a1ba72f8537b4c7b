"""Measure the contribution of each part of the model: change one factor of a base at a time, and train.

    python train/lab/ablate.py                                       the grid that the README quotes
    python train/lab/ablate.py --cells dense mla --seeds 0 1 --max-steps 200
    python train/lab/ablate.py --config gpu_small --out out/grid --minutes 600 --set train.compile=true

Every cell (see `cells_of`) changes one thing and keeps the feed-forward width that a token uses. Every run is
a separate `train/pre_train.py` in OUT/<cell>/seed<N>. Seeds are the outer loop, so a grid cut short still
compares all cells. Ctrl-C saves the current run; the same command continues, and trains nothing twice. Each
seed ends with table.md, results.json, loss.png and bpb.png.

All runs take the same number of steps, hence the same tokens under the same schedule. A cell may pay for its
loss with time or FLOPs, so the table shows both, and loss.png draws the curves over each. These are a rough
guide: a run's learning rate decays towards its own end, so a shorter run could do better at equal seconds.
`--minutes` is a safeguard: a run that exceeds its share of the time ends early and gets a star in the table.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import json
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import utils  # noqa: F401  sets OMP_WAIT_POLICY, so it must precede torch
import torch

from config.load import DEFAULT_PRESET, load_config, to_dict
from config.model import ModelConfig
from config.schema import RunConfig
from utils.checkpoint import final_name, find_checkpoints, latest_checkpoint, load_checkpoint
from utils.errors import Parser, UserError, run_main
from utils.log import read_log
from train.engine.checkpoints import MAY_CHANGE
from train.lab.ablation_report import cost_of, plot_losses, plot_results, table

ROOT = Path(__file__).resolve().parents[2]
STAGE, SHORT = "pre_train", "Pre"
STEPS = 180  # of each run: 30 runs of less than a minute on two cores
EVALUATIONS = 6  # during a run, on a part of the held-out data
START_SECONDS = 15  # of each run, before its first step and after its last evaluation
LOSS_WEIGHT, BIAS_RATE = 0.01, 0.001  # of a balance that the base lacks (2101.03961, 2408.15664)


def cells_of(base: RunConfig) -> dict[str, tuple[str, dict]]:
    """Return every cell but the base: name -> the change in words, and the settings that change.

    Twice as many experts of half the width, twice as many per token, leave K * F unchanged. So do shared
    experts that become routed ones: E + S experts, of which K + S are chosen.
    """
    model, balance = base.model, base.balance
    experts, chosen, shared = model.n_routed_experts, model.num_experts_per_tok, model.n_shared_experts
    width = model.moe_intermediate_size
    others = {
        "mtp_parallel": ("second head for the token after the next", {"model.mtp": "parallel"}),
        "mtp_sequential": ("second block for the token after the next", {"model.mtp": "sequential"}),
        "mla": ("latent attention", {"model.attention_kind": "mla"}),
        "mha": ("a key/value head for each query head",
                {"model.num_key_value_heads": model.num_attention_heads}),
    }  # fmt: skip
    if not experts:
        return others
    return {
        "dense": ("one feed-forward, no experts",
                  {"model.n_routed_experts": 0,
                   "model.intermediate_size": chosen * width + model.shared_width}),
        "fine": ("twice as many experts, half as wide",
                 {"model.n_routed_experts": 2 * experts, "model.num_experts_per_tok": 2 * chosen,
                  "model.n_shared_experts": 2 * shared, "model.moe_intermediate_size": width // 2}),
        "no_shared": ("the shared experts become routed ones",
                      {"model.n_routed_experts": experts + shared, "model.n_shared_experts": 0,
                       "model.num_experts_per_tok": chosen + shared}),
        "no_balance": ("nothing balances the experts", {"balance.weight": 0.0, "balance.bias_rate": 0.0}),
        "bias_only": ("balanced by the bias alone",
                      {"balance.weight": 0.0, "balance.bias_rate": balance.bias_rate or BIAS_RATE}),
        "loss_only": ("balanced by the global loss alone",
                      {"balance.weight": balance.weight or LOSS_WEIGHT, "balance.scope": "global",
                       "balance.bias_rate": 0.0}),
        **others,
    }  # fmt: skip


@dataclass
class Cell:
    """One row of the table."""

    name: str
    words: str  # the change
    settings: list[str]  # the change, written as for --set
    config: RunConfig


def main():
    """Plan, train the missing runs, report after each seed."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", default=DEFAULT_PRESET, metavar="NAME|FILE.json", help="the base (default: %(default)s)")
    add("--cells", nargs="+", metavar="CELL", help="default: all that fit the base; it is always included")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--max-steps", type=int, default=STEPS, metavar="N", help="steps of each run (default: %(default)s)")
    add("--minutes", type=float, default=90, metavar="M", help="limit for all runs (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "out" / "ablate", metavar="DIR", help="default: out/ablate")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings",
        help="a setting of the base, and so of all cells; may be repeated")  # fmt: skip
    args = parser.parse_args()
    if args.minutes <= 0 or args.max_steps < 1 or min(args.seeds) < 0:
        raise UserError("--minutes and --max-steps must be above 0, and --seeds at least 0")
    out = args.out
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a folder")
    # the last of the partial evaluations is close to the end: the final one reads all held-out data
    common = [f"train.eval_every={max(1, (args.max_steps - 1) // EVALUATIONS)}"]
    common += [f"train.log_every={1 + args.max_steps // 40}", *args.settings]
    cells, left_out = plan(args.config, common, args.max_steps, args.cells)
    seeds = list(dict.fromkeys(args.seeds))
    runs = [(seed, cell) for seed in seeds for cell in cells]
    missing = [run for run in runs if not is_finished(out, *run)]
    seconds = max(1.0, args.minutes * 60 / len(runs) - START_SECONDS)
    for line in left_out:
        print(f"left out: {line}")
    print(f"{len(cells)} cells x {len(seeds)} seeds = {len(runs)} runs of {args.max_steps} steps, "
          f"{len(missing)} to do, each in at most {seconds:.0f} seconds; into {out}")  # fmt: skip

    call = shlex.join(["python", "train/lab/ablate.py", *sys.argv[1:]])
    clock = time.monotonic()
    for number, (seed, cell) in enumerate(missing, start=1):
        folder = out / cell.name / f"seed{seed}"
        where = f"[{number}/{len(missing)}] {cell.name}, seed {seed}"
        print(f"{where} ...", flush=True)
        command = [ROOT / "train/pre_train.py", "--config", args.config, "--seed", seed, "--out", folder,
                   "--resume", "--max-steps", args.max_steps, "--max-seconds", f"{seconds:.6g}"]  # fmt: skip
        command += [part for text in common + cell.settings for part in ("--set", text)]
        train_run([sys.executable, *map(str, command)], folder / "output.txt", where)
        for path in find_checkpoints(folder, SHORT):  # together gigabytes; the result stays
            path.unlink()
        bpb = read_run(out, seed, cell)["val_bpb"]
        left = (time.monotonic() - clock) / number * (len(missing) - number) / 60
        print(f"{where}: val_bpb {bpb:.4f}; about {left:.0f} minutes left", flush=True)
        if number < len(missing) and missing[number][0] != seed:  # this seed is done in every cell
            report(out, cells, seeds[: seeds.index(seed) + 1], call)
    report(out, cells, seeds, call)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"saved {out / 'table.md'}, results.json, loss.png and bpb.png beside it")


def plan(name: str, common: list[str], max_steps: int, wanted=None) -> tuple[list[Cell], list[str]]:
    """Return the base and the cells to train, and a line for each cell left out. Check everything here."""
    flags = {"train": {"max_steps": max_steps, "max_seconds": None}}
    base = load_config(name, common, flags=flags)
    known = cells_of(base)
    if unknown := [cell for cell in wanted or () if cell not in ("base", *known)]:
        raise UserError(f"--cells {unknown[0]}: no such cell of {name}; it has base, {', '.join(known)}")
    cells, left_out = [Cell("base", f"the base, {name}", [], base)], []
    for cell in dict.fromkeys(one for one in wanted or known if one != "base"):
        words, changes = known[cell]
        settings = [f"{key}={value}" for key, value in changes.items()]
        config = load_config(name, common + settings, flags=flags)
        if used_widths(config.model) != used_widths(base.model):
            raise UserError(
                f"cell {cell} changes the feed-forward widths that a token uses from "
                f"{used_widths(base.model)} to {used_widths(config.model)}: choose others with --cells, or "
                "give the base experts of even width, and every layer the same"
            )
        if same := [other.name for other in cells if other.config == config]:
            left_out.append(f"{cell} ({words}): that is {same[0]}")
        else:
            cells.append(Cell(cell, words, settings, config))
    return cells, left_out


def used_widths(model: ModelConfig) -> list[int]:
    """Return, for each layer, the feed-forward width that one token uses, over all its experts."""
    width = model.num_experts_per_tok * model.moe_intermediate_size + model.shared_width
    layers = range(model.num_hidden_layers)
    return [width if model.is_moe_layer(layer) else model.intermediate_size for layer in layers]


def is_finished(out: Path, seed: int, cell: Cell) -> bool:
    """Return True if the run is finished. Raise `UserError` if its folder holds one with other settings."""
    folder = out / cell.name / f"seed{seed}"
    final = folder / final_name(SHORT)
    if path := final if final.exists() else latest_checkpoint(folder, SHORT):
        check_settings(load_checkpoint(path)["config"], folder, seed, cell)
    return final.exists()


def check_settings(saved: dict, folder: Path, seed: int, cell: Cell) -> None:
    """Raise `UserError` unless a run has the settings of this grid, its number of steps included; paths and
    reporting intervals may differ."""
    free = MAY_CHANGE - {"max_steps"}
    wanted = to_dict(cell.config)
    wanted["train"]["seed"] = seed
    wanted["model"]["vocab_size"] = wanted["model"]["vocab_size"] or saved["model"]["vocab_size"]
    for section, values in wanted.items():
        for key, value in values.items():
            was = saved.get(section, {}).get(key)
            if was != value and key not in free:
                raise UserError(
                    f"{folder} holds a run with {section}.{key}={was}, this grid says {value}: write to "
                    "another --out, or delete that folder"
                )


def train_run(command: list[str], output: Path, where: str) -> None:
    """Run `command`, with its output in the file `output`. Raise `UserError` with its error line.

    Ctrl-C and SIGTERM are passed on: the run saves a checkpoint before this returns.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with open(output, "wb") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            try:
                code = child.wait()
            except BaseException:
                print(f"{where}: stopping; run the same command to continue", flush=True)
                if os.name != "nt":  # on Windows Ctrl-C has reached it, and SIGTERM would not let it save
                    child.send_signal(signal.SIGTERM)
                child.wait()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        errors = re.findall("(?m)^error: (.*)", output.read_text(encoding="utf-8", errors="replace"))
        raise UserError(f"{where}: {errors[-1] if errors else f'ended with code {code}, see {output}'}")


def read_run(out: Path, seed: int, cell: Cell) -> dict:
    """Return the numbers of a finished run; `curve` holds (tokens, val_loss) of each partial evaluation."""
    folder = out / cell.name / f"seed{seed}"
    final = load_checkpoint(folder / final_name(SHORT))
    check_settings(final["config"], folder, seed, cell)
    rows = read_log(folder / STAGE / "log.txt")
    seconds = median(row["step_ms"] for row in rows if "step_ms" in row) / 1e3 * final["step"]
    logged = [row["max_vio"] for row in rows if "max_vio" in row]
    return {
        "seed": seed, "steps": final["step"], "tokens": final["tokens"],
        "cut": final["step"] < cell.config.train.max_steps, **final["evaluation"],
        "max_vio": final["evaluation"].get("val_max_vio", logged[-1] if logged else None),
        "seconds": seconds, "tok_s": final["tokens"] / seconds,
        "vocab_size": final["config"]["model"]["vocab_size"], "data_digest": final["data_digest"],
        "curve": [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row][:-1],
    }  # fmt: skip


def report(out: Path, cells: list[Cell], seeds: list[int], command: str) -> None:
    """Write results.json, table.md and both pictures from the finished runs of `cells` and `seeds`."""
    results = {}
    for cell in cells:
        runs = [read_run(out, seed, cell) for seed in seeds]
        cost = cost_of(cell.config, runs[0]["vocab_size"])
        results[cell.name] = {"words": cell.words, "settings": cell.settings, **cost, "runs": runs}
    if len({run["data_digest"] for result in results.values() for run in result["runs"]}) > 1:
        raise UserError(f"{out} holds runs on different data, which cannot be compared: use another --out")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    about = {"command": command, "machine": f"{os.cpu_count()} CPU cores{gpu}, PyTorch {torch.__version__}",
             "seeds": seeds, "base": to_dict(cells[0].config), "cells": results}  # fmt: skip
    (out / "results.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(about), encoding="utf-8")
    plot_losses(results, out / "loss.png")
    plot_results(results, out / "bpb.png")


if __name__ == "__main__":
    run_main(main)
