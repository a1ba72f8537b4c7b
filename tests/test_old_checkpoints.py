"""Load, chat with, resume and start from checkpoints of format 1, from before the files moved into rooms.

`tests/old_checkpoints/` holds what every stage left at commit 3b3d2a5, trained on three small files there:
`finished/` by runs that reached their last step, `stopped/` by the same commands with `--out stopped`, which
SIGTERM ended four steps earlier. With that commit, and `tests/old_checkpoints/` as the working directory:

    python train/pre_train.py --config pre_dense.json --out dense/finished
    python train/pre_train.py --config pre_moe.json --out finished
    python train/sft_train.py --config sft_train.json --init finished/TinySeek_Pre_final.pkl --out finished
    python train/lora_train.py --config lora_train.json --init finished/TinySeek_SFT_final.pkl --out finished

and mixlora_train, prefix_train and gate_train like lora_train. Of each stopped run, the newest intermediate
checkpoint is kept. The dense model has latent attention, a parallel head and AdamW; the one with experts has
a sequential head and Muon. No run uses dropout, whose random numbers depend on the processor. The rule that
splits dialogues has changed since; those of these files are on the same side by either rule. A stopped run
on dialogues that change sides is refused: "was trained on other data".

`answers.json` holds the greedy answers of the same commit. At each of their tokens the best logit leads by at
least 0.1, thousands of times what fp32 rounding changes.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from inference import chat
from tests.train.tools import TIMING_KEYS
from utils.checkpoint import final_name, latest_checkpoint, load_checkpoint
from utils.log import read_log

OLD = Path(__file__).with_name("old_checkpoints")
ANSWERS = json.loads((OLD / "answers.json").read_text(encoding="utf-8"))
PRE, SFT = "finished/TinySeek_Pre_final.pkl", "finished/TinySeek_SFT_final.pkl"
RUNS = {  # name: stage, name in files, configuration, base, folder
    "dense": ("pre_train", "Pre", "pre_dense.json", None, "dense/"),
    "experts": ("pre_train", "Pre", "pre_moe.json", None, ""),
    "sft": ("sft_train", "SFT", "sft_train.json", PRE, ""),
    "lora": ("lora_train", "Lora", "lora_train.json", SFT, ""),
    "mixlora": ("mixlora_train", "MixLora", "mixlora_train.json", SFT, ""),
    "prefix": ("prefix_train", "Prefix", "prefix_train.json", SFT, ""),
    "gate": ("gate_train", "Gate", "gate_train.json", SFT, ""),
}
COUNTS = {"max_vio", "dead", "val_max_vio", "val_dead"}  # a token between two equal experts changes these


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a copy of the old files, for resumed runs to write into."""
    return shutil.copytree(OLD, tmp_path_factory.mktemp("old") / "files")


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    """Enter the folder, as old files name each other by relative paths. Draw no pictures: they are slow."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)
    for name in ("plot_expert_load", "plot_expert_tokens"):
        monkeypatch.setattr(f"train.pre_train.{name}", lambda *_: None)


def call(monkeypatch, main, *arguments):
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    for name in ("stdin", "stdout", "stderr"):  # pytest's streams cannot be reconfigured
        monkeypatch.setattr(getattr(sys, name), "reconfigure", lambda **_: None, raising=False)
    main()


def train(monkeypatch, name, out, *more):
    """Train with the command that wrote the run `name`, in folder `out`."""
    stage, _, config, base, _ = RUNS[name]
    init = ["--init", base] if base else []
    cache = f"data.cache_dir={Path.cwd() / 'cache'}"
    main = importlib.import_module(f"train.{stage}").main
    call(monkeypatch, main, "--config", config, *init, "--out", out, "--set", cache, *more)


def flat(path):
    """Return all weights of a checkpoint as one fp64 vector."""
    weights = load_checkpoint(path)["weights"]
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.mark.parametrize("flags", [*ANSWERS, f"{PRE} --draft 2"])
def test_an_old_file_answers_as_before(flags, monkeypatch, capsys):
    path, *more = flags.split()
    flag = {"Pre": "--checkpoint", "SFT": "--checkpoint", "Gate": "--gate"}
    flag = flag.get(Path(path).stem.split("_")[1], "--adapter")
    for prompt, answer in ANSWERS[path].items():
        call(monkeypatch, chat.main, flag, path, *more, "--prompt", prompt, "--temperature", 0,
             "--max-new-tokens", 10, "--device", "cpu")  # fmt: skip
        shown = prompt + answer if "_Pre_" in path else answer
        assert capsys.readouterr().out == shown + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_resumes_to_the_same_end(name, monkeypatch):
    """The resumed run ends with the weights and the log of the run that was never stopped.

    Bounds: for the weights 2% of the distance that they had left to go, as Muon computes in bf16, whose
    rounding is 0.4%; for each logged number 2e-4, forty times what the fp32 rounding of another instruction
    set changed. A run that does not restore its optimizer state or data position exceeds them in every stage.
    """
    stage, short, _, _, parent = RUNS[name]
    stopped, finished = Path(parent, "stopped"), Path(parent, "finished")
    before = flat(latest_checkpoint(stopped, short))
    train(monkeypatch, name, stopped, "--resume")
    reached, expected = flat(stopped / final_name(short)), flat(finished / final_name(short))
    assert (reached - expected).norm() < 0.02 * (before - expected).norm()
    log, old_log = read_log(stopped / stage / "log.txt"), read_log(finished / stage / "log.txt")
    assert len(log) == len(old_log)
    for row, old in zip(log, old_log):
        old = {key: value for key, value in old.items() if key not in TIMING_KEYS | COUNTS}
        assert {key: row[key] for key in old} == pytest.approx(old, rel=2e-4, abs=1e-5)


def test_an_old_file_starts_the_next_stage(monkeypatch):
    """Full fine-tuning of an old model, and an adapter of an old fine-tuned one."""
    for name, base in {"sft": PRE, "lora": SFT}.items():
        train(monkeypatch, name, "next", "--max-steps", 2)
        saved = load_checkpoint(Path("next", final_name(RUNS[name][1])))
        assert saved["step"] in (1, 2) and saved["format_version"] == 2
        assert (saved["base"] is None) == (name == "sft") and Path(base).exists()
