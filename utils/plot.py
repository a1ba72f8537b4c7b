"""The curves of a run: loss, perplexity, learning rate, throughput, expert load where there are experts, and
what reinforcement learning logs.

    python utils/plot.py                         # out/pre_train/log.txt -> out/pre_train/curves.png
    python utils/plot.py LOG LOG --out both.png  # several runs in one picture
    python utils/plot.py LOG LOG --seconds       # over seconds, if a step costs more in one run
    python utils/plot.py LOG --panels reward length    # some of the panels, by words of their titles
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import itertools
import math
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no window, and no state shared with others

from utils.errors import Parser, UserError, run_main
from utils.log import read_log

ROOT = Path(__file__).resolve().parents[1]
COLORS = ["#1f6fb4", "#d95f02", "#2a9d5c", "#8e5bb5", "#c2406b", "#7a7a2a"]
OF_ONE_RUN = ["#1f6fb4", "#111111", "#d95f02", "#2a9d5c"]  # of the keys of a panel
LINES = ["-", "--", "-.", ":"]  # likewise, of several runs, which have a color each

# Title, label of the vertical axis, and the log keys: steps as a thin line, evaluations (`val_`) as a thick
# one. A panel is drawn if its first key is in a log.
PANELS = [
    ("Loss", "nats per token", ["loss", "val_loss"]),
    ("Perplexity", "exp(loss), log scale", ["ppl", "val_ppl"]),
    ("Learning rate", "learning rate", ["lr"]),
    ("Throughput", "tokens per second", ["tok_s"]),
    ("Expert load, worst layer", "(max - mean) / mean", ["max_vio"]),
    ("Reward", "mean over the samples", ["reward", "val_reward"]),
    ("Right answers", "share", ["right", "val_greedy", "val_pass1", "val_pass8"]),
    ("Distance to the reference", "KL in nats per token", ["kl"]),
    ("Entropy of the policy", "nats per token", ["entropy"]),
    ("Length of answers", "tokens", ["length", "val_length"]),
    ("Lost signal", "share", ["no_signal", "clip_frac", "truncated"]),
    ("Rollouts and updates", "tokens per second", ["rollout_tok_s", "update_tok_s"]),
    ("Chosen answer ahead of the rejected one", "share", ["acc", "val_acc"]),
]
LABELS = dict.fromkeys(("loss", "ppl", "reward", "right", "length", "acc"), "training") | {
    "val_greedy": "greedy", "val_pass1": "pass@1", "val_pass8": "pass@8",
    "no_signal": "groups without signal", "clip_frac": "clipped tokens", "truncated": "answers cut",
    "rollout_tok_s": "rollouts", "update_tok_s": "updates",
}  # fmt: skip


def plot_curves(
    log_path: str | Path | list, png_path: str | Path, seconds: bool = False, words: tuple[str, ...] = ("",)
) -> None:
    """Draw the curves of one log, or of several over each other, into `png_path`.

    The horizontal axis shows optimizer steps or, with `seconds`, the time they took, without evaluations.
    Drawn are the panels whose titles contain one of `words`. Raises `UserError` if a log is missing or holds
    no step yet, or if there is nothing to draw.
    """
    paths = log_path if isinstance(log_path, list) else [log_path]
    logs = {str(path): [row for row in read_log(path) if "step" in row] for path in paths}
    for path, rows in logs.items():
        if not rows:
            raise UserError(f"{path}: no step is logged yet, so there is nothing to draw")
    for rows in logs.values():
        set_places(rows, seconds)
    panels = [panel for panel in PANELS if any(panel[2][0] in row for rows in logs.values() for row in rows)]
    if not panels:
        raise UserError(f"{paths[0]}: contains none of the keys {', '.join(panel[2][0] for panel in PANELS)}")
    titles = ", ".join(title for title, *_ in panels)
    panels = [panel for panel in panels if any(word.lower() in panel[0].lower() for word in words)]
    if not panels:
        raise UserError(f"--panels {' '.join(words)}: in no title; {titles}")

    figure, places = make_panels(len(panels), width=4.5, height=3)
    names = run_names(list(logs))
    for axes, (title, unit, keys) in zip(places, panels):
        for rows, name, color in zip(logs.values(), names, COLORS * len(names)):
            draw(axes, rows, keys, name if len(names) > 1 else "", color)
        scale = "log" if title == "Perplexity" else "linear"
        if title == "Loss" and not any("ppl" in row for rows in logs.values() for row in rows):
            unit = "loss of the stage"  # not of a language model
        place = "seconds of training steps" if seconds else "step (optimizer updates)"
        axes.set(title=title, xlabel=place, ylabel=unit, yscale=scale)
        axes.grid(alpha=0.3)
        if unit == "share":
            axes.set_ylim(-0.02, 1.02)
        elif "tokens per second" in unit:
            axes.set_ylim(bottom=0)  # otherwise a little noise fills the panel
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=10)
    save_figure(figure, png_path)


def set_places(rows: list[dict], seconds: bool) -> None:
    """Set each row's `place` on the horizontal axis. `step_ms` is a mean since the previous row with one."""
    elapsed = last = 0
    for row in rows:
        if "step_ms" in row:
            elapsed += (row["step"] - last) * row["step_ms"] / 1e3
            last = row["step"]
        row["place"] = elapsed if seconds else row["step"]


def make_panels(count: int, width: float, height: float) -> tuple[Figure, list]:
    """Return a figure with `count` panels of this size in inches, two per row."""
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = Figure((width * columns + 1, height * rows + 0.5), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def save_figure(figure: Figure, png: str | Path) -> None:
    """Write the picture, creating missing folders."""
    try:
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=130)
    except OSError as error:
        raise UserError(f"cannot write {png}: {error.strerror}") from None


def draw(axes, rows: list[dict], keys: list[str], name: str, color: str) -> None:
    """Draw one run in one panel: steps, and evaluations on top. `name` is empty if there is only one run."""
    for number, key in enumerate(keys):
        points = [(row["place"], row[key]) for row in rows if key in row]
        if not points:
            continue
        measured = key.startswith("val_")
        style = {"linewidth": 2, "marker": "o"} if measured else {"linewidth": 1.2, "alpha": 0.75}
        style |= {"color": color, "linestyle": LINES[number]} if name else {"color": OF_ONE_RUN[number]}
        label = " ".join(filter(None, (name, LABELS.get(key, "validation" if measured else "")))) or None
        axes.plot(*zip(*points), markersize=4, label=label, **style)


def run_names(paths: list[str]) -> list[str]:
    """Return the paths of the logs without the parts that all of them share."""
    parts = [Path(path).resolve().parts for path in paths]
    columns = itertools.zip_longest(*parts, fillvalue="")
    differing = [column for column in columns if len(set(column)) > 1]
    return ["/".join(filter(None, run)) for run in zip(*differing)] or [""]


def main() -> None:
    """Run the command."""
    parser = Parser("Draw the curves of one or more runs.")
    add = parser.add_argument
    add("logs", nargs="*", type=Path, metavar="LOG", help="log files (default: out/pre_train/log.txt)")
    add("--seconds", action="store_true", help="draw over the seconds of training, not over steps")
    add("--panels", nargs="+", default=[""], metavar="WORD", help="panels with such words in their titles")
    add("--out", metavar="PNG", help="the picture (default: curves.png beside the first log)")
    args = parser.parse_args()
    logs = args.logs or [ROOT / "out" / "pre_train" / "log.txt"]
    png = args.out or logs[0].parent / "curves.png"
    plot_curves(logs, png, args.seconds, tuple(args.panels))
    print(f"drawn: {png}")


if __name__ == "__main__":
    run_main(main)
