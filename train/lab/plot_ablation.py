"""The pictures of an ablation: the loss of each cell, and its cost.

Both take `results`: {cell: {"runs": [...], "train_flops_per_token": ...}} as in results.json of
`train/lab/ablate.py`. A run has `val_bpb`, `seconds`, `tokens` and `curve`, its (tokens, val_loss) pairs.
"""

from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from utils.plot import save_figure

BASE_COLOR = "black"
COLORS = ["tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple",
          "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "gold"]  # fmt: skip


def plot_losses(results: dict, png: Path) -> None:
    """Draw validation loss over tokens, training FLOPs and seconds: median over seeds, and their range."""
    figure = Figure((15, 6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    units = ["tokens (thousands)", "training compute (TFLOP)", "seconds of training steps"]
    for (name, result), color in zip(results.items(), colors(results)):
        points = over_seeds([run["curve"] for run in result["runs"]])
        per_token = median(run["seconds"] / run["tokens"] for run in result["runs"])
        scales = [1e-3, result["train_flops_per_token"] / 1e12, per_token]
        middle = [median(losses) for losses in points.values()]
        low, high = [min(losses) for losses in points.values()], [max(losses) for losses in points.values()]
        for axes, scale in zip(panels, scales):
            x = [tokens * scale for tokens in points]
            thick = {"linewidth": 2.5, "zorder": 3} if name == "base" else {"linewidth": 1.5}
            axes.plot(x, middle, color=color, label=name, marker="o", markersize=3, **thick)
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    for axes, unit in zip(panels, units):
        axes.set_xlabel(unit, fontsize=12)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)", fontsize=12)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=12)
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
    for place, (result, color) in enumerate(zip(results.values(), colors(results))):
        values = [run["val_bpb"] for run in result["runs"]]
        axes.plot(values, [place] * len(values), "o", color=color, markersize=8, alpha=0.75)
        axes.plot([median(values)], [place], "|", color=color, markersize=24, markeredgewidth=2.5)
    axes.set_yticks(range(len(results)), list(results), fontsize=12)
    axes.set_ylim(len(results) - 0.5, -0.5)  # the base on top
    axes.set_title("Final score; grey is the range of the base", fontsize=13)
    axes.set_xlabel("validation bits per byte, left is better; dots are seeds, bars medians", fontsize=12)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, png)


def colors(results: dict) -> list[str]:
    """Return black for the base, and a color for each other cell."""
    return [BASE_COLOR, *(COLORS * len(results))[: len(results) - 1]]
