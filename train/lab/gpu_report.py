"""Check a GPU and measure training on it in less than nine minutes; write a JSON file and a Markdown table.

    python train/lab/gpu_report.py                 writes gpu_report.json and gpu_report.md
    python train/lab/gpu_report.py --minutes 4     skips what does not fit into the time

It runs the checks in tests/gpu (they need pytest), then measures four models with and without
`torch.compile`. A step is forward, backward, clipping and optimizers on random tokens. Model FLOPs (hence
MFU) and predicted memory come from utils/cost.py. The checks run in one process and each model in its own,
with a time limit, so that a crash or a hang spoils nothing else; both files are rewritten after each. Without
a GPU, everything runs in a small mode on the CPU, which only shows that the script works. The exit code is 1
if anything failed; a model that runs out of memory or time has not failed.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import itertools
import json
import re
import statistics
import subprocess
import time
from pathlib import Path

import utils  # noqa: F401  sets how threads wait; must precede torch
import torch

from config.load import load_config
from model.tinyseek import TinySeek
from train.engine import parallel
from train.engine.command import ROOT
from train.engine.machine import start_machine
from train.engine.optimizers import build_optimizers
from utils.cost import cost_card
from utils.device import peak_flops, pick_dtype, synchronize
from utils.errors import Parser, UserError, run_main

CHECKS = ROOT / "tests" / "gpu"
LIMIT, LEAST = 150.0, 30.0  # seconds: most for the checks or one model; least left to begin a model
WARM_UP, STEPS = 3, 10
LARGE = ["model.hidden_size=1024", "model.num_hidden_layers=24", "model.num_attention_heads=16",
         "model.num_key_value_heads=8", "model.intermediate_size=3328", "train.batch_size=16"]  # fmt: skip
EXPERTS = ["model.n_routed_experts=16", "model.num_experts_per_tok=4", "model.n_shared_experts=1",
           "model.moe_intermediate_size=640"]  # fmt: skip
MODELS = {  # name -> preset and changes; five experts of 640 are nearly as wide as the dense 3,328
    "gpu_small": ("gpu_small", []),
    "gpu_base": ("gpu_base", []),
    "350 M": ("gpu_base", LARGE),
    "350 M active, experts": ("gpu_base", LARGE + EXPERTS),
}
SMALL = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=4",
         "model.num_key_value_heads=2", "model.intermediate_size=48", "model.moe_intermediate_size=8",
         "model.vocab_size=64", "data.sequence_length=16", "train.batch_size=2"]  # fmt: skip
COLUMNS = ["model", "compiled", "parameters", "active", "tokens/s", "MFU %", "ms per step", "peak GiB",
           "predicted GiB", "start-up s", "note"]  # fmt: skip


def main() -> int:
    """Run the checks, measure the models, write the results; return 1 if anything failed."""
    parser = Parser(__doc__)
    parser.add_argument("--out", default=ROOT / "out" / "gpu_report", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit for everything (default 8.5)")
    parser.add_argument("--model", choices=MODELS, help="only measure this one, and print a line of JSON")
    parser.add_argument("--compile", action="store_true", help="compile it; with --model")
    args = parser.parse_args()
    if args.model:
        print(json.dumps(measure(args.model, args.compile)))
        return 0
    end, kind = time.monotonic() + 60 * args.minutes, "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if kind == "cuda" else "CPU, small mode: the figures mean nothing"
    dtype, _, reason = pick_dtype("auto", torch.device(kind))
    print(f"{name}; PyTorch {torch.__version__}; {reason}")
    checks = {"passed": [], "failed": [], "problem": "still running"}
    about = {"device": name, "torch": torch.__version__, "dtype": str(dtype), "checks": checks, "models": []}
    write(args.out, about)
    about["checks"] = check(kind, end - time.monotonic())
    write(args.out, about)
    for model, compiled in itertools.product(MODELS, (False, True)):
        row, left = {"model": model, "compiled": "yes" if compiled else "no"}, end - time.monotonic()
        print(f"{left:4.0f} s left; {model}{', compiled' if compiled else ''}: ", end="", flush=True)
        if compiled and kind == "cpu":  # compiling takes longer than all the rest
            row["note"] = "not in the small mode"
        elif left < LEAST:
            row["note"] = "no time was left"
        else:
            words = ["--model", model, *(["--compile"] if compiled else [])]
            said, problem = run([__file__, *words], min(LIMIT, left))
            row |= {"note": problem} if problem else json.loads(said.splitlines()[-1])
            row["failed"] = problem.startswith("exit code") and "out of memory" not in problem
        about["models"].append(row)
        print(row.get("note") or f"{row['tokens/s']:,} tokens/s")
        write(args.out, about)
    failed = [row["model"] for row in about["models"] if row.get("failed")]
    failed += ["checks"] if about["checks"]["problem"] else []
    print(f"wrote {args.out}: gpu_report.json, gpu_report.md; FAILED: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def run(arguments: list, seconds: float) -> tuple[str, str]:
    """Run Python with these arguments; return its output, and what went wrong, if anything."""
    command = [sys.executable, *map(str, arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(errors="replace"), f"not done within {seconds:.0f} s"
    said, errors = (words.decode(errors="replace") for words in (done.stdout, done.stderr))
    if not done.returncode:
        return said, ""
    print(errors, file=sys.stderr)
    *_, last = [""] + errors.strip().splitlines()
    return said, f"exit code {done.returncode}: {last}"


def check(kind: str, left: float) -> dict:
    """Run tests/gpu on this kind of device; return the names of tests that passed and failed."""
    words = ["-m", "pytest", "-o", "addopts=", "-v", "-p", "no:cacheprovider", "-k", kind, CHECKS]
    said, problem = run(words, min(LIMIT, left))
    passed, failed = (re.findall(rf"::test_(\S+) {word}", said) for word in ("PASSED", "(?:FAILED|ERROR)"))
    if problem:
        print(said)
    print(f"checks: {len(passed)} passed, {len(failed)} failed{': ' if problem else ''}{problem}")
    return {"passed": passed, "failed": failed, "problem": problem}


def measure(name: str, compiled: bool) -> dict:
    """Train one of `MODELS` for a few steps (a tiny version without a GPU); return its row of the table."""
    preset, changes = MODELS[name]
    start, small = time.monotonic(), [] if torch.cuda.is_available() else SMALL
    config = load_config(preset, [*changes, *small])
    train, rows, length = config.train, config.train.batch_size, config.data.sequence_length
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    machine = start_machine(config)
    model = TinySeek(config.model).to(machine.device)
    card = cost_card(model, rows * length, length, config.optim.optimizer)
    runner, optimizers = parallel.prepare(model, compiled), build_optimizers(model, config.optim)
    ids = torch.randint(config.model.vocab_size, (rows, length + 1), device=machine.device)
    inputs, labels, times = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), []
    for _ in range(WARM_UP + STEPS):
        synchronize(machine.device)
        began = time.perf_counter()
        for _ in range(train.accumulation_steps):
            with machine.autocast():
                loss = runner(inputs, labels=labels).loss_sum / labels.numel() / train.accumulation_steps
            loss.backward()
        parallel.clip(model, config.optim.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(machine.device)
        times.append(time.perf_counter() - began)
    seconds, cuda = statistics.median(times[WARM_UP:]), machine.device.type == "cuda"
    speed = rows * length * train.accumulation_steps / seconds
    peak = peak_flops(torch.cuda.get_device_name() if cuda else "", machine.dtype)
    return {
        "parameters": card.parameters,
        "active": card.active_parameters,
        "tokens/s": round(speed),
        "MFU %": 100 * speed * card.train_flops() / peak if peak else None,
        "ms per step": 1e3 * seconds,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "predicted GiB": (sum(card.state_bytes.values()) + card.activation_bytes) / 2**30,
        "start-up s": time.monotonic() - start - sum(times[WARM_UP:]),
    }


def write(out: Path, about: dict) -> None:
    """Write the results so far: everything as JSON, and the models as a table with a line on the checks."""

    def cell(value) -> str:
        """Format a number, None or a word."""
        if isinstance(value, float):
            return f"{value:,.2f}"
        return f"{value:,}" if isinstance(value, int) else value or ""

    lines = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 3) + ["---"]]
    lines += [[cell(row.get(column)) for column in COLUMNS] for row in about["models"]]
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    passed, failed, problem = about["checks"].values()
    text = f"{about['device']}, PyTorch {about['torch']}, {about['dtype']}. Checks: {len(passed)} passed, "
    text += "; ".join([f"{len(failed)} failed", *failed, *([problem] if problem else [])])
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_report.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (out / "gpu_report.md").write_text(f"{rows}\n{text}.\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None


if __name__ == "__main__":
    run_main(main)
