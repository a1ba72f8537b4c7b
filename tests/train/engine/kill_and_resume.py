"""Kill training at random moments with SIGKILL, resume it, and compare with a run that was never stopped.

    python tests/train/engine/kill_and_resume.py --runs 20

Each run is killed three times, anywhere: while Python starts, while the data are prepared, in a step, in the
middle of writing a checkpoint (one is written after every step), in the last evaluation. Then it is resumed
to its end. Final weights and optimizer states must be equal bit by bit, and the log line by line, its timing
aside. Dropout is on, so that random states matter. Four kinds of run take turns: pre-training with Muon of a
model with experts, their bias and loss, noise in the router and a second head; LoRA on dialogues; dense
pre-training with AdamW; and fine-tuning of all weights. The two of fine-tuning keep the best of all epochs.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))  # repository root

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from tests.inference.tools import write_checkpoint
from tests.processes import Forked, without_pictures
from tests.train.tools import PRE_TRAIN, environment, same_bits, without_timing
from utils.checkpoint import find_checkpoints, load_checkpoint
from utils.log import read_log

STEPS = 24
STAGES = {"muon": "pre_train", "lora": "lora_train", "adamw": "pre_train", "sft": "sft_train"}
KINDS = tuple(STAGES)  # any two neighbours are one of pre-training and one of fine-tuning
SHORTS = {"pre_train": "Pre", "lora_train": "Lora", "sft_train": "SFT"}


def prepare(folder: Path) -> Path:
    """What the runs learn from: a text, dialogues, and a base to fine-tune. Returns the folder."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(PRE_TRAIN.parent.glob("*.py"))]
    (folder / "text.txt").write_text("".join(sources), encoding="utf-8")
    with (folder / "dialogues.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            turns = [("user", f"say {number}"), ("assistant", f"{number}, {number} and {number}")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    write_checkpoint(folder / "base.pkl", "SFT")
    return folder


def arguments(out: Path, material: Path, kind: str) -> list[str]:
    """The arguments of a run with a checkpoint after every step."""
    settings = {
        "train.save_every": 1, "train.eval_every": 7, "train.log_every": 3, "data.cache_dir": out / "cache",
    }  # fmt: skip
    flags = ["--out", out, "--device", "cpu", "--max-steps", STEPS, "--resume"]
    if STAGES[kind] == "pre_train":
        flags += ["--config", "tiny", "--data", material / "text.txt"]
        settings |= {
            "model.dropout": 0.1, "model.attention_dropout": 0.1, "optim.optimizer": kind,
            "tokenizer.vocab_size": 400,
        }  # fmt: skip
    else:
        flags += ["--data", material / "dialogues.jsonl", "--init", material / "base.pkl"]
        settings |= {"data.sequence_length": 60, "train.batch_size": 4, "lora.lora_dropout": 0.1}
        settings |= {"model.dropout": 0.1, "train.dtype": "fp32", "data.val_fraction": 0.1}
    if kind == "muon":
        settings |= {
            "model.n_routed_experts": 4, "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 16,
            "model.router_jitter_noise": 0.1, "model.mtp": "sequential", "balance.bias_rate": 0.01,
            "balance.weight": 0.01, "balance.statistics": "exact",
        }  # fmt: skip
    settings = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [*map(str, flags), *settings]


def start(out: Path, material: Path, kind: str) -> subprocess.Popen:
    """The run as a subprocess, silent unless it fails."""
    script = PRE_TRAIN.with_name(STAGES[kind] + ".py")
    command = [sys.executable, script, *arguments(out, material, kind)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **quiet)


def start_forked(out: Path, material: Path, kind: str) -> Forked:
    """The run as a process that need not start Python: 0.3 seconds instead of 4."""
    return Forked(without_pictures, f"train.{STAGES[kind]}", *arguments(out, material, kind))


def to_the_end(process, timeout: float = 120) -> float:
    """Wait until a run is finished; returns the seconds it took."""
    clock = time.monotonic()
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, f"the run failed:\n{output}\n{errors}"
    return time.monotonic() - clock


def result(out: Path, kind: str) -> tuple[dict, list]:
    """What must be equal: weights and optimizer states in one dictionary, and the log without its timing."""
    stage = STAGES[kind]
    final = load_checkpoint(out / f"TinySeek_{SHORTS[stage]}_final.pkl")
    last = load_checkpoint(find_checkpoints(out, SHORTS[stage])[-1])
    tensors = final["weights"] | {"step": torch.tensor(final["step"])}
    tensors |= {f"last.{name}": tensor for name, tensor in last["weights"].items()}
    for number, optimizer in enumerate(last["training"]["optimizers"]):
        for index, state in optimizer["state"].items():
            tensors |= {f"{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    logs = [out / stage / name for name in ("log.txt", "experts.txt")]
    return tensors, [without_timing(read_log(log)) for log in logs if log.exists()]


def kill_somewhere(process, out: Path, kind: str, seconds: float, rng: random.Random) -> str:
    """Kill a run that has just started or resumed at a random moment; returns where that was."""
    if rng.random() < 0.4:  # any moment at all
        wait_for(process, lambda: False, rng.uniform(0, seconds))
    else:  # within training, which is short beside Python's start
        log = out / STAGES[kind] / "log.txt"
        before = log.stat().st_mtime_ns if log.exists() else 0
        wait_for(process, lambda: log.exists() and log.stat().st_mtime_ns > before, 60)
        wait_for(process, lambda: False, rng.uniform(0, 0.6))
    ended = process.poll() is not None
    process.kill()
    process.communicate()
    if ended:
        return "after the end"
    if any(out.glob("*.tmp")):
        return "while saving"
    if (out / "cache").exists() and not any(out.glob("cache/[td]*s_*")):  # tokens_, dialogues_
        return "while preparing data"
    saved = find_checkpoints(out, SHORTS[STAGES[kind]])
    return "while training" if saved else "before the first checkpoint"


def wait_for(process, happened, seconds: float) -> None:
    """Wait until `happened()`, the process ends, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not happened():
        time.sleep(0.001)


def campaign(runs: int, kills: int, seed: int, folder: Path, start=start) -> str:
    """Kill and resume `runs` runs; returns one line about it. Raises `AssertionError` on the first
    difference."""
    rng = random.Random(seed)
    prepare(folder)
    expected, seconds, places = {}, {}, {}
    for number in range(runs):
        kind, out = KINDS[(seed + number) % len(KINDS)], folder / f"run_{number}"
        if kind not in expected:
            seconds[kind] = to_the_end(start(folder / kind, folder, kind))
            expected[kind] = result(folder / kind, kind)
        for _ in range(kills):
            place = kill_somewhere(start(out, folder, kind), out, kind, seconds[kind], rng)
            places[place] = places.get(place, 0) + 1
        to_the_end(start(out, folder, kind))
        tensors, log = result(out, kind)
        where = f"run {number} ({kind}, seed {seed}) in {out}"
        assert same_bits(tensors, expected[kind][0]), f"{where}: other weights than the unbroken run"
        assert log == expected[kind][1], f"{where}: another log than the unbroken run"
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
