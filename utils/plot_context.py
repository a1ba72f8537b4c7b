"""Pictures of long contexts: the loss by position, and what is recalled by length and depth."""

import numpy as np

from utils.plot import COLORS, make_panels, save_figure

BINS = 24  # of a curve, evenly spaced over the logarithm of the position


def plot_losses(curves: dict[str, np.ndarray], trained: int, png) -> None:
    """Draw the loss at each position (length,) of each method; a line marks the `trained` length."""
    figure, (axes,) = make_panels(1, width=8, height=4.5)
    styles = [(color, line) for line in ("-", "--", ":") for color in COLORS]
    for (name, losses), (color, line) in zip(curves.items(), styles):
        edges = np.unique(np.geomspace(8, len(losses), BINS + 1).astype(int))
        means = [losses[start:stop].mean() for start, stop in zip(edges[:-1], edges[1:])]
        axes.plot(np.sqrt(edges[:-1] * edges[1:]), means, label=name, color=color, linestyle=line)
    axes.axvline(trained, color="grey", linestyle="-.", label="trained length")
    axes.set(title="Loss by position", xlabel="position (tokens)", ylabel="nats per token", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, png)


def plot_recall(grids: dict[str, np.ndarray], lengths: list[int], depths: list, title: str, png) -> None:
    """Draw one heat map per method: percent recalled, (lengths, depths)."""
    figure, panels = make_panels(len(grids), width=4.5, height=3.2)
    for axes, (name, grid) in zip(panels, grids.items()):
        image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        axes.set(title=name, xlabel="depth of the line", ylabel="tokens")
        axes.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        for (i, j), percent in np.ndenumerate(grid):
            axes.text(j, i, f"{percent:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=panels, label="percent recalled", aspect=40)
    figure.suptitle(title, fontsize=15)
    save_figure(figure, png)
