"""The report of an ablation: a table of costs and scores, and pictures of the losses and the scores.

`results` maps each cell to `{"runs": [...], "train_flops_per_token": ...}`, as in the results.json of
`train/lab/ablate.py`. A run has `val_bpb`, `seconds`, `tokens` and `curve`, its (tokens, val_loss) pairs.
"""

import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure

from config.schema import RunConfig
from model.tinyseek import TinySeek
from utils.cost import cost_card
from utils.plot import save_figure


def cost_of(config: RunConfig, vocab_size: int) -> dict:
    """Return what the model of a cell costs, from its settings alone."""
    length = config.data.sequence_length
    with torch.device("meta"):
        model = TinySeek(replace(config.model, vocab_size=vocab_size))
    card = cost_card(model, config.train.batch_size * length, length)
    return {
        "parameters": card.parameters,
        "active_parameters": card.active_parameters,
        "train_flops_per_token": card.train_flops(),
        "cache_bytes_per_token": card.kv_cache_bytes(),
    }


def against(base: list[float], values: list[float]) -> str:
    """Return the difference of two medians, and whether it exceeds noise by the rule in `foot`."""
    difference = median(values) - median(base)
    if min(len(base), len(values)) < 2:
        return f"{difference:+.4f} (one seed)"
    overlap = min(values) <= max(base) and min(base) <= max(values)
    if overlap or abs(difference) <= max(base) - min(base):
        return f"{difference:+.4f} indistinguishable"
    return f"{difference:+.4f}"


def table(about: dict) -> str:
    """Return the results as Markdown: a row for each cell, then the meaning of the columns."""
    results = about["cells"]
    base = [run["val_bpb"] for run in results["base"]["runs"]]
    head = ["cell", "what changes", "parameters", "active", "MFLOP per token", "val_bpb", "min to max",
            "against base", "tokens/s", "seconds", "max_vio", "cache bytes per token"]  # fmt: skip
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for name, result in results.items():
        runs = result["runs"]
        bpb, speeds, seconds = ([run[key] for run in runs] for key in ("val_bpb", "tok_s", "seconds"))
        loads = [run["max_vio"] for run in runs if run["max_vio"] is not None]
        rows.append([
            name + ("*" if any(run["cut"] for run in runs) else ""), result["words"],
            f"{result['parameters']:,}", f"{result['active_parameters']:,}",
            f"{result['train_flops_per_token'] / 1e6:.2f}",
            f"{median(bpb):.4f}", f"{min(bpb):.4f} to {max(bpb):.4f}",
            "" if name == "base" else against(base, bpb),
            f"{median(speeds):,.0f}", f"{median(seconds):.1f}",
            f"{median(loads):.2f}" if loads else "-", f"{result['cache_bytes_per_token']:,}",
        ])  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + foot(about) + "\n"


def foot(about: dict) -> str:
    """Return the notes below the table."""
    results, steps, count = about["cells"], about["base"]["train"]["max_steps"], len(about["seeds"])
    tokens = max(run["tokens"] for run in results["base"]["runs"])
    lines = [
        f"`{about['command']}`: {steps} steps ({tokens:,} tokens) in every run; seeds "
        f"{', '.join(map(str, about['seeds']))}; {about['machine']}.",
        "val_bpb is bits per byte on all held-out data after the last step: the median over seeds, and their "
        "range. MFLOP per token is a training step; seconds are the median step times the steps, without "
        "evaluations; max_vio is (max - mean) / mean of the expert load in the worst layer; the cache is in "
        "bf16.",
        "Rule: a difference of medians is *indistinguishable* when the ranges over seeds overlap, or when it "
        "is not larger than the range of the base.",
    ]
    if count >= 2:
        ways = math.comb(2 * count, count)
        lines[-1] += (
            f" With {count} seeds, two equal cells have disjoint ranges with probability 2 / {ways} = "
            f"{2 / ways:.1%}: among many cells, one such difference proves little."
        )
    if any(run["cut"] for result in results.values() for run in result["runs"]):
        lines.append("\\* ended by --minutes: fewer tokens and an earlier decay, not comparable.")
    changes = [f"- {name}: `{' '.join(cell['settings'])}`" for name, cell in results.items()]
    return "\n\n".join([*lines, "\n".join(changes[1:])])  # the base comes first


def plot_losses(results: dict, png: Path) -> None:
    """Draw validation loss over tokens, training FLOPs and seconds: median over seeds, and their range."""
    figure = Figure((15, 6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    units = ["tokens (thousands)", "training compute (TFLOP)", "seconds of training steps"]
    for number, (name, result) in enumerate(results.items()):
        color = f"C{number}" if number else "black"
        points = over_seeds([run["curve"] for run in result["runs"]])
        per_token = median(run["seconds"] / run["tokens"] for run in result["runs"])
        scales = [1e-3, result["train_flops_per_token"] / 1e12, per_token]
        middle, low, high = ([pick(losses) for losses in points.values()] for pick in (median, min, max))
        for axes, scale in zip(panels, scales):
            x = [tokens * scale for tokens in points]
            thick = {"linewidth": 2.5, "zorder": 3} if name == "base" else {"linewidth": 1.5}
            axes.plot(x, middle, color=color, label=name, marker="o", markersize=3, **thick)
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    for axes, unit in zip(panels, units):
        axes.set_xlabel(unit)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)", fontsize=12)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save_figure(figure, png)


def over_seeds(curves: list[list]) -> dict[int, list[float]]:
    """Return {tokens: losses of all seeds} where every seed was measured, without the first: the loss of an
    untrained model would flatten all that follows."""
    tables = [dict(map(tuple, curve)) for curve in curves]
    shared = sorted(set.intersection(*map(set, tables)))
    return {tokens: [table[tokens] for table in tables] for tokens in shared if tokens > 0}


def plot_results(results: dict, png: Path) -> None:
    """Draw the final bits per byte: a row for each cell, a dot for each seed, a bar at the median."""
    figure = Figure((9, 1.5 + 0.45 * len(results)), layout="constrained")
    axes = figure.subplots()
    base = [run["val_bpb"] for run in results["base"]["runs"]]
    axes.axvspan(min(base), max(base), color="0.85", zorder=0)
    for place, result in enumerate(results.values()):
        color = f"C{place}" if place else "black"
        values = [run["val_bpb"] for run in result["runs"]]
        axes.plot(values, [place] * len(values), "o", color=color, markersize=8, alpha=0.75)
        axes.plot([median(values)], [place], "|", color=color, markersize=24, markeredgewidth=2.5)
    axes.set_yticks(range(len(results)), list(results), fontsize=12)
    axes.set_ylim(len(results) - 0.5, -0.5)  # the base on top
    axes.set(title="Final score; grey is the range of the base",
             xlabel="validation bits per byte, left is better; dots are seeds, bars medians")  # fmt: skip
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, png)
