"""Pictures of a mixture of experts: their load over training, and the kinds of tokens each one takes.

A log of experts has lines `step=10  L0E0=0.0625  L0E1=0.07 ..`: the share of layer 0's assignments that
expert 0 got.
"""

import math
import re
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm

from utils.errors import UserError
from utils.log import read_log
from utils.plot import make_panels, save_figure

KEY = re.compile(r"L(\d+)E(\d+)")
TOP = 3.0  # loads of three times the mean and more have one colour


def plot_expert_load(log_path: str | Path, png_path: str | Path) -> None:
    """Draw one heat map per layer: load / mean load of each expert (y) at each logged step (x).

    1 is balanced; all panels have one colour scale. The title has the layer's last MaxVio,
    (max - mean) / mean. Raises `UserError` if the log is missing or broken, or has no expert in it.
    """
    steps, loads = read_loads(log_path)
    experts = max(load.shape[1] for load in loads.values())
    figure, panels = make_panels(len(loads), width=6, height=1.6 + 0.11 * min(64, experts))
    for axes, (layer, load) in zip(panels, loads.items()):
        image = axes.imshow(
            load.T, aspect="auto", interpolation="nearest", origin="lower", cmap="RdBu_r",
            norm=TwoSlopeNorm(1.0, 0.0, TOP),
        )  # fmt: skip
        violation = load[-1].max() - 1  # in units of the mean
        axes.set(title=f"Layer {layer}: MaxVio {violation:.2f} at step {steps[-1]:,}", ylabel="expert",
                 xlabel="step (optimizer updates)", yticks=some(load.shape[1], 8))  # fmt: skip
        columns = some(len(steps), 8)  # a column per logged step, so that uneven steps are labelled correctly
        axes.set_xticks(columns, [f"{steps[column]:,}" for column in columns])
    figure.colorbar(image, ax=panels, extend="max", ticks=[0, 0.5, 1, 2, TOP], aspect=40,
                    label="load / mean load (1 is balanced)")  # fmt: skip
    figure.suptitle("Load of the experts over training", fontsize=15)
    save_figure(figure, png_path)


def plot_expert_tokens(shares, kinds: list[str], png_path: str | Path) -> None:
    """Draw one heat map per layer: the share of the assignments of each kind of token (y) that went to each
    expert (x).

    `shares` (layers, kinds, experts): rows add up to 1; a row of NaN, a kind that did not occur, stays grey,
    and the caption says so.
    """
    shares = np.asarray(shares, dtype=float)
    count, _, experts = shares.shape
    colors = colormaps["viridis"].with_extremes(bad="lightgrey")
    top = np.nanmax(shares, initial=1 / experts)
    figure, panels = make_panels(count, width=4 + 0.22 * min(48, experts), height=1.4 + 0.3 * len(kinds))
    for layer, (axes, share) in enumerate(zip(panels, shares)):
        image = axes.imshow(share, aspect="auto", interpolation="nearest", cmap=colors, vmin=0, vmax=top)
        axes.set(title=f"Layer {layer}", xlabel="expert", xticks=some(experts, 16))
        axes.set_yticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=panels, format=lambda share, _: f"{share:.0%}", aspect=40,
                    label=f"share (even would be {100 / experts:.3g}%)")  # fmt: skip
    caption = "Which experts each kind of token goes to (each row adds up to 100%)"
    if missing := [kind for row, kind in enumerate(kinds) if np.isnan(shares[:, row]).all()]:
        caption += f"\ngrey: no tokens of this kind here ({', '.join(missing)})"
    figure.suptitle(caption, fontsize=15)
    save_figure(figure, png_path)


def read_loads(path: str | Path) -> tuple[list[int], dict[int, np.ndarray]]:
    """Return the logged steps, and for each layer the load / mean load, (steps, experts)."""
    rows = [row for row in read_log(path) if "step" in row and any(KEY.fullmatch(key) for key in row)]
    if not rows:
        raise UserError(f"{path}: no expert's load is logged (keys like L0E0), so there is nothing to draw")
    names = sorted(tuple(map(int, match.groups())) for match in map(KEY.fullmatch, rows[0]) if match)
    loads = {}
    for layer in dict.fromkeys(layer for layer, _ in names):
        keys = [f"L{layer}E{expert}" for other, expert in names if other == layer]
        table = np.array([[row.get(key, math.nan) for key in keys] for row in rows])  # (steps, experts)
        broken = ~((table >= 0).all(axis=1) & (table.sum(axis=1) > 0) & (table.sum(axis=1) < math.inf))
        if broken.any():
            wanted = f"{keys[0]} to {keys[-1]} must be there, none below 0 and not all of them 0"
            raise UserError(f"{path}, step {rows[broken.argmax()]['step']}: {wanted}")
        loads[layer] = table / table.mean(axis=1, keepdims=True)
    return [row["step"] for row in rows], loads


def some(count: int, most: int) -> list[int]:
    """Return the places 0, n, 2n, .. below `count`, at most `most` of them."""
    return list(range(0, count, math.ceil(count / most)))
