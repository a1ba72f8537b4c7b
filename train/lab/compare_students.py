"""Compare students of one teacher: alone and with each kind of distillation, for the same seconds.

    python train/lab/compare_students.py --seconds 60 240                     text: new students
    python train/lab/compare_students.py --task dialogues --init STUDENT.pkl
    python train/lab/compare_students.py --task answers --init STUDENT.pkl --steps 300 --data skills:sums

With `text` and `dialogues` all students read the same data; see `KINDS`. A step beside a teacher takes
longer, so the time of a step is measured first, once for each kind, and a run takes as many steps as fit into
`--seconds`: noise during a run changes nothing. With `answers` they learn the same questions by cross-entropy
alone, with bare values, the teacher's answers or worked solutions (train/engine/teacher_answers.py).

Every run is a separate `train/distill_train.py` in OUT/<kind>.../seed<N>. Seeds are the outer loop. Ctrl-C
saves the current run; the same command continues, and trains nothing twice. The end is table.md, medians over
seeds with their ranges: bits per byte on held-out data, and right answers to held-out questions. students.png
draws bits per byte over seconds.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import re
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import utils  # noqa: F401  sets how threads wait; must precede torch
from matplotlib.figure import Figure

from inference.evaluate import score_skills
from inference.generation.exchange import PLAIN, Request
from inference.generation.generator import Generator
from inference.generation.load import load_full
from load_data.chat.chat_data import chosen_skills
from train.lab.ablate import ROOT, train_run
from train.lab.compare_recipes import cell, check_settings, folder_of
from utils.checkpoint import final_name, load_checkpoint
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main
from utils.log import read_log
from utils.plot import save_figure

SHORT = "Distill"
BEST = ["distill.temperature=2", "distill.ce_weight=0"]
INSIDE = {"hidden": ["distill.hidden=cosine"], "relations": ["distill.attention=relations"]}
STORED = ["distill.store_logits=true", "distill.top_k=32"]
KINDS = {
    "alone": ["distill.logits=none"],
    "logits": [],  # forward KL beside the cross-entropy; `stored`: the same, the teacher asked beforehand
    "soft": BEST,  # at temperature 2, without the cross-entropy
    **{kind: ["distill.logits=none", *settings] for kind, settings in INSIDE.items()},
    "all": [*BEST, *INSIDE["hidden"], *INSIDE["relations"]],
}
ANSWERS = {kind: ["distill.logits=none", f"distill.answers={kind}"]
           for kind in ("labels", "teacher", "solutions")}  # fmt: skip
TASKS = {"text": KINDS, "dialogues": KINDS | {"stored": STORED}, "answers": ANSWERS}
FIRST, PACE = 5, 30  # steps that warm up, and steps that are timed
BUDGET = 64  # tokens of thinking


class Run(NamedTuple):
    """One kind of student, of one size, for one time; equal for all seeds."""

    kind: str
    width: int | None  # hidden_size; None: that of the preset, or of --init
    steps: int
    seconds: int | None  # None: --steps was given

    @property
    def name(self) -> str:
        """The folder of the run."""
        return named(self.kind, self.width, self.seconds)


def main():
    """Train the missing runs, and report."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=[*TASKS], default="text", help="default: %(default)s")
    add("--init", type=Path, metavar="FILE", help="the student that all begin with (default: a new one)")
    add("--teacher", type=Path, metavar="FILE", help="default: the pre-trained or fine-tuned model in out/")
    add("--kinds", nargs="+", metavar="KIND", help="default: all of the task")
    add("--widths", nargs="+", type=int, default=[None], metavar="C", help="of new students, multiples of 32")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--seconds", nargs="+", type=int, default=[60], metavar="S", help="of each run (default: 60)")
    add("--steps", type=int, metavar="N", help="of each run, instead of seconds")
    add("--data", default="", metavar="DATA", help="as of distill_train.py (default: that of the task)")
    add("--count", type=int, default=300, metavar="N", help="questions about answers (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: out/students_TASK")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings",
        help="a setting of all runs; may be repeated")  # fmt: skip
    args = parser.parse_args()
    complete(args)
    check_settings(args, "task", "init", "teacher", "data", "steps")
    sizes = list(product(args.kinds, args.widths))
    paces = {} if args.steps else {size: pace(args, *size) for size in sizes}
    if args.steps:
        runs = [Run(*size, args.steps, None) for size in sizes]
    else:
        runs = [Run(*size, max(1, round(seconds / paces[size])), seconds)
                for size, seconds in product(sizes, args.seconds)]  # fmt: skip
    for number, (seed, run) in enumerate(product(args.seeds, runs), start=1):
        where = f"[{number}/{len(runs) * len(args.seeds)}] {run.name}, seed {seed}"
        train(args, run.kind, run.width, folder_of(args.out, run.name, seed), seed, run.steps, where)
    text = answers_table(args, runs) if args.task == "answers" else table(args, runs)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    if args.task != "answers":
        plot(args, runs, args.out / "students.png")
    print(f"\n{text}\nsaved {args.out / 'table.md'}")


def complete(args) -> None:
    """Fill in what depends on the task. Raise `UserError` for what does not fit."""
    args.kinds = args.kinds or [*TASKS[args.task]]
    args.teacher = args.teacher or ROOT / "out" / final_name("Pre" if args.task == "text" else "SFT")
    if unknown := [kind for kind in args.kinds if kind not in TASKS[args.task]]:
        raise UserError(f"--kinds {unknown[0]}: --task {args.task} has {', '.join(TASKS[args.task])}")
    if missing := [path for path in (args.init, args.teacher) if path and not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file; train/distill_train.py makes a student, and "
                        "train/sft_train.py a teacher")  # fmt: skip
    if min(*args.seconds, 1 if args.steps is None else args.steps, args.count) < 1 or min(args.seeds) < 0:
        raise UserError("--seconds, --steps and --count must be at least 1, and --seeds at least 0")
    if args.widths != [None] and (args.init or any(width < 32 or width % 32 for width in args.widths)):
        raise UserError("--widths are multiples of 32, of new students: leave out --init, or --widths")
    if args.task != "text" and not args.init:
        raise UserError(f"--task {args.task} goes on with a student: name one of --task text with --init")
    args.data = args.data or ("skills:arithmetic" if args.task == "answers" else "")
    args.out = args.out or ROOT / "out" / f"students_{args.task}"


def train(args, kind: str, width: int | None, folder: Path, seed: int, steps: int, where: str) -> None:
    """Train one student if it has not been trained; continue a run that was stopped."""
    if (folder / final_name(SHORT)).exists():
        return
    flags = ["--seed", seed, "--out", folder, "--resume", "--max-steps", steps]
    flags += ["--config", "skills"] if args.task != "text" else []
    flags += ["--init", args.init] if args.init else []
    flags += ["--data", args.data] if args.data else []
    sets = [*TASKS[args.task][kind], f"distill.teacher={args.teacher.resolve()}", "train.max_seconds=null",
            f"train.log_every={FIRST}", *args.settings]  # fmt: skip
    if width:
        shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 32,
                 "num_key_value_heads": width // 32}  # fmt: skip
        sets += [f"model.{name}={value}" for name, value in shape.items()]
    print(f"{where} ...", flush=True)
    parts = [sys.executable, ROOT / "train" / "distill_train.py", *flags]
    command = [*map(str, parts), *(part for text in sets for part in ("--set", text))]
    train_run(command, folder / "output.txt", where)


def pace(args, kind: str, width: int | None) -> float:
    """Return the seconds that a step takes."""
    name = named(kind, width)
    folder = folder_of(args.out, "pace", name)
    train(args, kind, width, folder, 0, FIRST + PACE, f"pace of {name}")
    rows = read_log(folder / "distill_train" / "log.txt")
    times = [row["step_ms"] for row in rows if row.get("step_ms") and row["step"] > FIRST]
    return median(times) / 1e3  # other programs slow some steps down


def named(*parts) -> str:
    """Return a name for a folder: all that is known of a run."""
    return "-".join(str(part) for part in parts if part)


def finals(args, run: Run) -> list[dict]:
    """Return the last checkpoint of a run for each seed."""
    return [load_checkpoint(folder_of(args.out, run.name, seed) / final_name(SHORT)) for seed in args.seeds]


def size_of(final: dict) -> int:
    """Return the number of parameters in a checkpoint; a tied head is the embedding under another name."""
    return sum({weight.data_ptr(): weight.numel() for weight in final["weights"].values()}.values())


def table(args, runs: list[Run]) -> str:
    """Return a row for each run: its size, its budget, its loss, and its scores, if it was scored."""
    lines, skills = [], []
    for run in sorted(runs, key=lambda run: (run.seconds or 0, run.width or 0)):
        ends = finals(args, run)
        if args.task == "dialogues":
            scores = [scores_of(folder_of(args.out, run.name, seed)) for seed in args.seeds]
            skills = [*scores[0]]
        losses = [end["evaluation"]["val_bpb"] for end in ends]
        cells = [run.kind, f"{size_of(ends[0]):,}", run.seconds or "", run.steps, spread(losses)]
        cells += [cell([float(one[name]) / 100 for one in scores]) for name in skills]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    heads = ["student", "parameters", "seconds", "steps", "bits per byte", *skills]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1), *lines]) + "\n"


def scores_of(folder: Path) -> dict[str, str]:
    """Return the share of right answers of each skill, in percent, that a training found at its end."""
    text = (folder / "distill_train" / "scores.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^(\w+) .*after=(\S+)", text))


def spread(values: list[float]) -> str:
    """Return the median, and the range in brackets."""
    middle = f"{median(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f} to {max(values):.3f})"


def plot(args, runs: list[Run], png: Path) -> None:
    """Draw bits per byte over the budget: a line for each kind, a marker for each size, and the teacher."""
    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    for size, width in enumerate(args.widths):
        for number, kind in enumerate(args.kinds):
            chosen = [run for run in runs if (run.kind, run.width) == (kind, width)]
            ends = [finals(args, run) for run in chosen]
            losses = [[end["evaluation"]["val_bpb"] for end in some] for some in ends]
            middle = [median(some) for some in losses]
            low = [value - min(some) for value, some in zip(middle, losses, strict=True)]
            high = [max(some) - value for value, some in zip(middle, losses, strict=True)]
            axes.errorbar([run.seconds or run.steps for run in chosen], middle, [low, high], capsize=3,
                          color=f"C{number}", marker="osD^v"[size % 5],
                          label=f"{kind}, {size_of(ends[0][0]) / 1e6:.2f} million parameters")  # fmt: skip
    teacher = load_checkpoint(args.teacher)
    axes.axhline(teacher["evaluation"]["val_bpb"], color="gray", linestyle="--",
                 label=f"the teacher, {size_of(teacher) / 1e6:.2f} million")  # fmt: skip
    timed = runs[0].seconds is not None
    axes.set(xlabel="seconds of training" if timed else "steps", ylabel="bits per byte on held-out data",
             xscale="log" if timed else "linear", title=f"students of {args.task}")  # fmt: skip
    budgets = sorted({run.seconds or run.steps for run in runs})
    axes.set_xticks(budgets, map(str, budgets))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save_figure(figure, png)


def answers_table(args, runs: list[Run]) -> str:
    """Return a table for each skill: a row for each run, asked at once and asked to think."""
    device, names = pick_device("auto"), chosen_skills([args.data])
    set_threads()
    asked = {"at once": PLAIN, "with thinking": Request(thinking=True, budget=BUDGET)}
    rows = {name: [f"| {name} | {' | '.join(asked)} | tokens |", "| --- |" + " ---: |" * 3] for name in names}
    for run in runs:
        paths = [folder_of(args.out, run.name, seed) / final_name(SHORT) for seed in args.seeds]
        students = [load_full(path, device) for path in paths]
        for name in names:
            cells, tokens = [], 0.0
            for request in asked.values():
                if request.thinking and run.kind != "solutions":
                    cells.append("")
                    continue
                scores = [score(one, name, request, args.count) for one in students]
                cells.append(cell([one.percent / 100 for one in scores]))
                tokens = mean(one.tokens for one in scores)  # of the last way to ask
            rows[name].append(f"| {run.name} | {' | '.join(cells)} | {tokens:.1f} |")
    return "\n\n".join("\n".join(lines) for lines in rows.values()) + "\n"


def score(student, name: str, request: Request, count: int):
    """Return the score of a student on held-out questions of one skill."""
    generator, held_out = Generator(student.model, student.tokenizer.eos_id), student.config.data.val_fraction
    return score_skills(generator, student.template, [name], count, held_out, request)[name]


if __name__ == "__main__":
    run_main(main)
