"""Kill training at random moments with SIGKILL, resume it, and compare with a run that was never stopped.

    python tests/train/kill_and_resume.py --runs 20

Each run is killed three times, anywhere: while Python starts, while the text is prepared, in a step, in the
middle of writing a checkpoint (one is written after every step), in the last evaluation. Then it is resumed
to its end. Final weights and optimizer states must be equal bit by bit, and the log line by line, its timing
aside. Dropout is on, so that random states matter. Every second run trains with Muon a model with experts,
their bias and loss, noise in the router and a second head; the others are dense, with AdamW.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import argparse
import random
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from tests.train.tools import PRE_TRAIN, environment, same_bits
from utils.checkpoint import find_checkpoints, load_checkpoint
from utils.log import read_log, without_timing

STEPS = 40
OPTIMIZERS = ("muon", "adamw")


def command(out: Path, text: Path, optimizer: str) -> list[str]:
    """The command of a run: the tiny preset with a checkpoint after every step."""
    settings = {
        "model.dropout": 0.1, "model.attention_dropout": 0.1, "optim.optimizer": optimizer,
        "tokenizer.vocab_size": 400, "train.save_every": 1, "train.eval_every": 7, "train.log_every": 3,
        "data.cache_dir": out / "cache",
    }  # fmt: skip
    if optimizer == "muon":
        settings |= {
            "model.n_routed_experts": 4, "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 16,
            "model.router_jitter_noise": 0.1, "model.mtp": "sequential", "balance.bias_rate": 0.01,
            "balance.weight": 0.01, "balance.statistics": "exact",
        }  # fmt: skip
    flags = [
        "--config",
        "tiny",
        "--data",
        text,
        "--out",
        out,
        "--device",
        "cpu",
        "--max-steps",
        STEPS,
        "--resume",
    ]
    settings = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, PRE_TRAIN, *map(str, flags), *settings]


def start(out: Path, text: Path, optimizer: str) -> subprocess.Popen:
    """The run as a subprocess, silent unless it fails."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(out, text, optimizer), env=environment(), **quiet)


def to_the_end(out: Path, text: Path, optimizer: str) -> float:
    """Run, or go on, until it is finished; returns the seconds it took."""
    clock = time.monotonic()
    process = start(out, text, optimizer)
    output, _ = process.communicate(timeout=120)
    if process.returncode:
        raise AssertionError(f"the run in {out} failed:\n{output}")
    return time.monotonic() - clock


def result(out: Path) -> tuple[dict, list]:
    """What must be equal: weights and optimizer states in one dictionary, and the log without its timing."""
    tensors = dict(load_checkpoint(out / "TinySeek_Pre_final.pkl")["weights"])
    last = load_checkpoint(find_checkpoints(out, "Pre")[-1])
    for number, optimizer in enumerate(last["training"]["optimizers"]):
        for index, state in optimizer["state"].items():
            tensors |= {f"{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    logs = [out / "pre_train" / name for name in ("log.txt", "experts.txt")]
    return tensors, [without_timing(read_log(log)) for log in logs if log.exists()]


def kill_somewhere(out: Path, text: Path, optimizer: str, seconds: float, rng: random.Random) -> str:
    """Start or resume the run and kill it at a random moment; returns where that was."""
    process = start(out, text, optimizer)
    if rng.random() < 0.4:  # any moment at all
        wait_for(process, lambda: False, rng.uniform(0, seconds))
    else:  # within training, which is short beside Python's start
        log = out / "pre_train" / "log.txt"
        before = log.stat().st_mtime_ns if log.exists() else 0
        wait_for(process, lambda: log.exists() and log.stat().st_mtime_ns > before, 60)
        wait_for(process, lambda: False, rng.uniform(0, 1.0))
    ended = process.poll() is not None
    process.kill()
    process.communicate()
    if ended:
        return "after the end"
    if any(out.glob("*.tmp")):
        return "while saving"
    if (out / "cache").exists() and not any((out / "cache").glob("tokens_*")):
        return "while preparing data"
    return "while training" if find_checkpoints(out, "Pre") else "before the first checkpoint"


def wait_for(process: subprocess.Popen, happened, seconds: float) -> None:
    """Wait until `happened()`, the process ends, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not happened():
        time.sleep(0.001)


def campaign(runs: int, kills: int, seed: int, folder: Path) -> str:
    """Kill and resume `runs` runs; returns one line about it. Raises `AssertionError` on the first
    difference."""
    rng = random.Random(seed)
    text = folder / "text.txt"
    sources = [path.read_text(encoding="utf-8") for path in sorted(PRE_TRAIN.parent.glob("*.py"))]
    text.write_text("".join(sources), encoding="utf-8")
    expected, seconds, places = {}, {}, {}
    for optimizer in OPTIMIZERS[: min(runs, 2)]:
        seconds[optimizer] = to_the_end(folder / optimizer, text, optimizer)
        expected[optimizer] = result(folder / optimizer)
    for number in range(runs):
        optimizer, out = OPTIMIZERS[number % 2], folder / f"run_{number}"
        for _ in range(kills):
            place = kill_somewhere(out, text, optimizer, seconds[optimizer], rng)
            places[place] = places.get(place, 0) + 1
        to_the_end(out, text, optimizer)
        tensors, log = result(out)
        where = f"run {number} ({optimizer}, seed {seed}) in {out}"
        assert same_bits(tensors, expected[optimizer][0]), f"{where}: other weights than the unbroken run"
        assert log == expected[optimizer][1], f"{where}: another log than the unbroken run"
    words = ", ".join(f"{count} {place}" for place, count in sorted(places.items()))
    return f"{runs} runs killed {runs * kills} times ({words}): all equal to the unbroken run, bit by bit"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Kill training at random moments, resume, compare.")
    parser.add_argument("--runs", type=int, default=20, metavar="N")
    parser.add_argument("--kills", type=int, default=3, metavar="N", help="kills in each run")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(campaign(args.runs, args.kills, args.seed, Path(folder)))


if __name__ == "__main__":
    main()
