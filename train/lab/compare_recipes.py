"""Compare the recipes of reinforcement learning: the same task, the same seconds, several seeds.

    python train/lab/compare_recipes.py --init out/align/TinySeek_SFT_final.pkl
    python train/lab/compare_recipes.py --init BASE.pkl --recipes grpo rft --seconds 300 --data skills:lists

Every run is a separate `train/grpo_train.py` (`ppo_train.py` for the recipe with a critic) in
OUT/<recipe>/seed<N>. Seeds are the outer loop. Ctrl-C saves the current run; the same command continues, and
trains nothing twice. The end is table.md, a table for each skill with medians over seeds and their ranges,
and right.png, the share of right samples over the seconds of training. Recipe `rft` is the yardstick: more
fine-tuning, on right samples.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import shlex
from pathlib import Path
from statistics import mean, median

from matplotlib.figure import Figure

from config.rl import RECIPES
from utils.checkpoint import final_name
from utils.errors import Parser, UserError, run_main
from utils.log import read_log
from utils.plot import save_figure, set_places
from train.lab.ablate import ROOT, train_run

MEASURES = {"val_greedy": "greedy", "val_pass1": "pass@1", "val_pass8": "pass@8"}
POINTS = 14  # of each line of the picture


def main():
    """Train the missing runs, and report."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--init", required=True, type=Path, metavar="FILE", help="the fine-tuned model that all begin with")
    add("--recipes", nargs="+", default=[*RECIPES], metavar="RECIPE", help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--seconds", type=int, default=90, metavar="S", help="of training in each run (default: %(default)s)")
    add("--data", default="skills:sums", metavar="skills:A,B", help="the task (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "out" / "recipes", metavar="DIR", help="default: out/recipes")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings",
        help="a setting of all runs; may be repeated")  # fmt: skip
    args = parser.parse_args()
    if unknown := [recipe for recipe in args.recipes if recipe not in RECIPES]:
        raise UserError(f"--recipes {unknown[0]}: no such recipe; there are {', '.join(RECIPES)}")
    if args.seconds < 1 or min(args.seeds) < 0:
        raise UserError("--seconds must be at least 1, and --seeds at least 0")
    if not args.init.is_file():
        raise UserError(f"--init {args.init}: no such file; train/sft_train.py --config align makes one")
    check_settings(args, "init", "data", "seconds")
    runs = [(seed, recipe) for seed in args.seeds for recipe in args.recipes]
    for number, (seed, recipe) in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {recipe}, seed {seed}"
        if not any(folder_of(args.out, recipe, seed).glob(final_name("*"))):
            print(f"{where} ...", flush=True)
            train_run(command(args, recipe, seed), folder_of(args.out, recipe, seed) / "output.txt", where)
    logs = {recipe: [log_of(args.out, recipe, seed) for seed in args.seeds] for recipe in args.recipes}
    (args.out / "table.md").write_text(table(logs), encoding="utf-8")
    plot(logs, args.out / "right.png")
    print(f"\n{table(logs)}\nsaved {args.out / 'table.md'}, and right.png beside it")


def check_settings(args, *flags: str) -> None:
    """Note what all runs share: the values of `flags`, and of --set. Raise `UserError` if `--out` holds runs
    of others: they are not trained again, and would be compared as if they had these."""
    if args.out.is_file():
        raise UserError(f"--out {args.out} is a file; name a folder")
    note, shared = args.out / "settings.txt", {flag: getattr(args, flag) for flag in flags}
    words = [part for flag, value in shared.items() if value
             for part in (f"--{flag}", value.resolve() if isinstance(value, Path) else value)]  # fmt: skip
    words = shlex.join(map(str, [*words, *args.settings])) + "\n"
    if note.exists() and (was := note.read_text(encoding="utf-8")) != words:
        raise UserError(f"--out {args.out} holds runs of {was.strip()}; name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    note.write_text(words, encoding="utf-8")


def short(recipe: str) -> str:
    """Return the name of a recipe's stage."""
    return "PPO" if RECIPES[recipe].advantage == "gae" else "GRPO"


def folder_of(out: Path, recipe: str, seed: int) -> Path:
    """Return the folder of a run."""
    return out / recipe / f"seed{seed}"


def command(args, recipe: str, seed: int) -> list[str]:
    """Return the command of a run; it continues one that was stopped."""
    settings = [f"rl.recipe={recipe}", "train.log_every=1", "train.eval_every=1000000", *args.settings]
    parts = [sys.executable, ROOT / "train" / f"{short(recipe).lower()}_train.py", "--init", args.init,
             "--data", args.data, "--seed", seed, "--out", folder_of(args.out, recipe, seed), "--resume",
             "--max-steps", 1_000_000, "--max-seconds", args.seconds]  # fmt: skip
    return [*map(str, parts), *(part for text in settings for part in ("--set", text))]


def log_of(out: Path, recipe: str, seed: int) -> list[dict]:
    """Return the rows of the log of a run; the folder of one that trains an adapter has a name of its own."""
    (path,) = folder_of(out, recipe, seed).glob("*/log.txt")
    return read_log(path)


def table(logs: dict[str, list[list[dict]]]) -> str:
    """Return a table for each skill: a row for the base and for each recipe, best pass@1 first."""
    ends = {recipe: [[row for row in log if "val_greedy" in row][-1] for log in runs]
            for recipe, runs in logs.items()}  # fmt: skip
    starts = [next(row for row in log if "val_greedy" in row) for runs in logs.values() for log in runs]
    suffixes = sorted({key.removeprefix("val_pass1") for key in starts[0] if key.startswith("val_pass1")})
    lines = []
    for suffix in suffixes if len(suffixes) == 1 else suffixes[1:]:  # the first is that of all skills
        lines += [f"| {suffix.strip('_') or 'recipe'} | {' | '.join(MEASURES.values())} | steps |"]
        lines += ["| --- |" + " ---: |" * (len(MEASURES) + 1)]
        order = sorted(ends, key=lambda recipe: -median(row[f"val_pass1{suffix}"] for row in ends[recipe]))
        for name, rows in [("base", starts), *((recipe, ends[recipe]) for recipe in order)]:
            cells = [cell([row[key + suffix] for row in rows]) for key in MEASURES]
            lines.append(f"| {name} | {' | '.join(cells)} | {median(row['step'] for row in rows):.0f} |")
        lines.append("")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    """Return the median in percent, and the range in brackets."""
    percent = sorted(100 * value for value in values)
    middle = f"{median(percent):.1f}"
    return middle if percent[0] == percent[-1] else f"{middle} ({percent[0]:.1f} to {percent[-1]:.1f})"


def plot(logs: dict[str, list[list[dict]]], png: Path) -> None:
    """Draw the share of right samples over seconds: for each recipe, the mean of all its runs."""
    for runs in logs.values():
        for log in runs:
            set_places(log, seconds=True)  # the time of steps without signal counts too
    steps = {recipe: [row for log in runs for row in log if "right" in row] for recipe, runs in logs.items()}
    width = max(row["place"] for rows in steps.values() for row in rows) / POINTS or 1.0
    figure = Figure((9, 6), layout="constrained")
    axes = figure.subplots()
    for number, (recipe, rows) in enumerate(steps.items()):
        parts = {(n + 0.5) * width: [] for n in range(POINTS)}  # the middle of each span of time
        for row in rows:
            parts[(min(int(row["place"] / width), POINTS - 1) + 0.5) * width].append(row["right"])
        points = {place: mean(part) for place, part in parts.items() if part}
        axes.plot([*points], [*points.values()], color=f"C{number}", marker="o", markersize=4, label=recipe)
    axes.set(xlabel="seconds of training steps", ylabel="right samples, mean over seeds", ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(logs))
    save_figure(figure, png)


if __name__ == "__main__":
    run_main(main)
