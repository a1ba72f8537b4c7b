"""Compare what a student learns from text: its own bare answers, a teacher's, or worked solutions.

    python train/lab/compare_students.py --init out/TinySeek_Distill_final.pkl
    python train/lab/compare_students.py --init STUDENT.pkl --teacher BIG.pkl --steps 800 --data skills:sums

All runs begin with the student of --init, and learn the same questions with answers of one kind (`labels`,
`teacher`, `solutions`: see train/engine/teacher_answers.py), by cross-entropy alone. Rows are packed, so
equal steps are equal tokens, and take equal seconds. Every run is a separate `train/distill_train.py` in
OUT/<kind>/seed<N>. Seeds are the outer loop. Ctrl-C saves the current run; the same command continues, and
trains nothing twice.

The end is table.md: right answers to held-out questions, medians over seeds and their ranges, when asked for
the answer, and when asked to think first, which only students of `solutions` have learned.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

from pathlib import Path
from statistics import mean

import utils  # noqa: F401  sets how threads wait; must precede torch
from inference.evaluate import score_skills
from inference.generation.exchange import PLAIN, Request
from inference.generation.generator import Generator
from inference.generation.load import load_full
from load_data.chat.chat_data import chosen_skills
from train.lab.ablate import ROOT, train_run
from train.lab.compare_recipes import cell, check_settings, folder_of
from utils.checkpoint import final_name
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

KINDS = ("labels", "teacher", "solutions")
SHORT = "Distill"
BUDGET = 64  # tokens of thinking


def main():
    """Train the missing runs, score all, and report."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--init", required=True, type=Path, metavar="FILE", help="the student that all begin with")
    teacher = ROOT / "out" / final_name("SFT")
    add("--teacher", type=Path, default=teacher, metavar="FILE", help="default: %(default)s")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--steps", type=int, default=400, metavar="N", help="of each run (default: %(default)s)")
    add("--data", default="skills:arithmetic", metavar="skills:A,B", help="default: %(default)s")
    add("--count", type=int, default=300, metavar="N", help="held-out questions (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "out" / "students", metavar="DIR", help="default: out/students")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings",
        help="a setting of all runs; may be repeated")  # fmt: skip
    args = parser.parse_args()
    if missing := [path for path in (args.init, args.teacher) if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file; train/distill_train.py makes a student, and "
                        "train/sft_train.py a teacher")  # fmt: skip
    if min(args.steps, args.count) < 1 or min(args.seeds) < 0:
        raise UserError("--steps and --count must be at least 1, and --seeds at least 0")
    args.settings = [f"distill.teacher={args.teacher.resolve()}", *args.settings]
    check_settings(args, "steps")
    runs = [(seed, kind) for seed in args.seeds for kind in args.kinds]
    for number, (seed, kind) in enumerate(runs, start=1):
        where, folder = f"[{number}/{len(runs)}] {kind}, seed {seed}", folder_of(args.out, kind, seed)
        if not (folder / final_name(SHORT)).exists():
            print(f"{where} ...", flush=True)
            train_run(command(args, kind, seed), folder / "output.txt", where)
    text = table(args)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nsaved {args.out / 'table.md'}")


def command(args, kind: str, seed: int) -> list[str]:
    """Return the command of a run; it continues one that was stopped."""
    settings = [f"distill.answers={kind}", "distill.logits=none", *args.settings]
    parts = [sys.executable, ROOT / "train" / "distill_train.py", "--config", "skills", "--init", args.init,
             "--data", args.data, "--seed", seed, "--out", folder_of(args.out, kind, seed), "--resume",
             "--max-steps", args.steps]  # fmt: skip
    return [*map(str, parts), *(part for text in settings for part in ("--set", text))]


def table(args) -> str:
    """Return a table for each skill: a row for each kind."""
    device, names = pick_device("auto"), chosen_skills([args.data])
    set_threads()
    asked = {"at once": PLAIN, "with thinking": Request(thinking=True, budget=BUDGET)}
    rows = {name: [f"| {name} | {' | '.join(asked)} | tokens |", "| --- |" + " ---: |" * 3] for name in names}
    for kind in args.kinds:
        paths = [folder_of(args.out, kind, seed) / final_name(SHORT) for seed in args.seeds]
        students = [load_full(path, device) for path in paths]
        for name in names:
            cells, tokens = [], 0.0
            for request in asked.values():
                if request.thinking and kind != "solutions":
                    cells.append("")
                    continue
                scores = [score(one, name, request, args.count) for one in students]
                cells.append(cell([one.percent / 100 for one in scores]))
                tokens = mean(one.tokens for one in scores)  # of the last way to ask
            rows[name].append(f"| {kind} | {' | '.join(cells)} | {tokens:.1f} |")
    return "\n\n".join("\n".join(lines) for lines in rows.values()) + "\n"


def score(student, name: str, request: Request, count: int):
    """Return the score of a student on held-out questions of one skill."""
    generator, held_out = Generator(student.model, student.tokenizer.eos_id), student.config.data.val_fraction
    return score_skills(generator, student.template, [name], count, held_out, request)[name]


if __name__ == "__main__":
    run_main(main)
