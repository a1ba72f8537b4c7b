"""The commands of README.md work: each is run with a small end, and those that need a GPU are parsed.

Every fenced block marked `bash` is read. `python train/...` and `torchrun ... train/...` are run with a tiny
model and two steps, after one such run has made a model for the chat; other scripts of ours are run as they
are written, with that model. A text that a command names and that is not in the repository is made here. What
is left, `make` targets and pip's files, must exist.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from config.load import load_config
from tests.train.tools import ROOT, environment
from train.cli import parse_command

README = ROOT / "README.md"
NEEDS_GPU = ("gpu_", "--device cuda", "nccl")
TEXT = "\n".join(f"To be or not to be, that is question {number}." for number in range(400))
SMALL = [
    f"--set={setting}"
    for setting in (
        "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2",
        "model.num_key_value_heads=1", "model.intermediate_size=32", "model.head_dim=16",
        "tokenizer.vocab_size=400", "tokenizer.train_bytes=100000", "data.limit=60",
        "data.worked_examples=20", "data.sequence_length=32", "train.batch_size=2",
        "train.accumulation_steps=1", "train.eval_batches=1",
    )
]  # fmt: skip


def blocks(text: str) -> list[str]:
    """The fenced blocks marked bash."""
    return re.findall(r"^[ ]*```(?:bash|sh|shell)\n(.*?)^[ ]*```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of all blocks: continued lines joined, prompts and comments taken off."""
    lines = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+#.*$", "", line.strip().removeprefix("$ ")) for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def script_of(words: list[str]) -> str | None:
    """The script or module of ours that a command runs; None for another program."""
    if words[0] not in ("python", "python3", "torchrun"):
        return None
    if "-m" in words[:2]:
        name = words[2]
        return None if name in ("pip", "venv", "pytest", "ruff") else name.replace(".", "/") + ".py"
    return next((word for word in words if word.endswith(".py")), None)


COMMANDS = commands(README.read_text(encoding="utf-8")) if README.exists() else []
OURS = [command for command in COMMANDS if script_of(shlex.split(command))]
TRAINING = [command for command in OURS if script_of(shlex.split(command)) == "train/pre_train.py"]
OTHERS = [command for command in OURS if command not in TRAINING]


def test_the_reader_of_blocks_can_fail():
    """It finds commands in all their spellings; otherwise the tests below would test nothing."""
    text = "```bash\n$ python a.py --x 1  # why\n\ntorchrun --nproc_per_node 2 \\\n  b.py\n# no\n```\n"
    text += "```\npython c.py\n```"
    assert commands(text) == ["python a.py --x 1", "torchrun --nproc_per_node 2    b.py"]
    assert script_of(shlex.split("torchrun --nproc_per_node 2 b.py --data x.txt")) == "b.py"
    assert script_of(shlex.split("python -m modules.rope")) == "modules/rope.py"
    assert script_of(shlex.split("python -m pip install x")) is None and script_of(["make"]) is None


def test_there_are_commands():
    assert TRAINING and any("chat.py" in command for command in OTHERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_names_exists(command):
    """Scripts, modules, requirement files, presets, make targets."""
    words = shlex.split(command)
    if script := script_of(words):
        assert (ROOT / script).is_file(), f"README.md: `{command}`: there is no {script}"
    for flag, value in zip(words, words[1:]):
        if flag == "-r":
            assert (ROOT / value).is_file(), f"README.md: `{command}`: there is no {value}"
        if flag == "--config" and not value.endswith(".json"):
            load_config(value)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"README.md: `{command}`: no such target"


def with_texts(words: list[str], folder: Path) -> list[str]:
    """The same words; texts that are not there become one that is made in `folder`."""
    made = folder / "text.txt"
    made.write_text(TEXT, encoding="utf-8")
    return [str(made) if word.endswith(".txt") and not (ROOT / word).exists() else word for word in words]


def without(words: list[str], *flags: str) -> list[str]:
    """The same words less some flags and the value of each."""
    kept, skip = [], False
    for word in words:
        if not skip and word not in flags:
            kept.append(word)
        skip = not skip and word in flags
    return kept


def run(words: list[str]) -> subprocess.CompletedProcess:
    """A command in the repository root; python is this one, torchrun its module."""
    program = [sys.executable]
    if words[0] == "torchrun":
        program += ["-m", "torch.distributed.run", *([] if "--standalone" in words else ["--standalone"])]
    return subprocess.run(
        [*program, *words[1:]], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a run of two steps: what chat and curves need."""
    out = tmp_path_factory.mktemp("model")
    words = with_texts(["python", "train/pre_train.py", "--data", "gone.txt"], out)
    done = run(
        [*words, "--out", str(out), "--max-steps", "2", *SMALL, f"--set=data.cache_dir={out / 'cache'}"]
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_are_parsed(command, tmp_path, monkeypatch):
    """Every one, those for GPUs too: its flags exist and its settings are right."""
    words = shlex.split(command)
    arguments = words[words.index("train/pre_train.py") + 1 :]
    if "--help" in arguments:
        return
    init = arguments[arguments.index("--init") + 1] if "--init" in arguments else ""
    assert not init or init.startswith("out/"), f"README.md: `{command}`: where does {init} come from?"
    parse_command("pre_train", "Pre", "", [*without(arguments, "--out", "--init"), "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in TRAINING if not any(word in c for word in NEEDS_GPU)])
def test_training_commands_run(command, model, tmp_path):
    """With two steps, a tiny model and little data, elsewhere; a second process is really started."""
    words = with_texts(shlex.split(command), tmp_path)
    words = without(words, "--out", "--max-steps", "--max-seconds", "--limit", "--nproc_per_node")
    processes = ["--nproc_per_node", "2"] if words[0] == "torchrun" else []
    words = [words[0], *processes, *words[1:]]
    if "--init" in words:
        words[words.index("--init") + 1] = str(model / "TinySeek_Pre_final.pkl")
    if "--help" not in words:
        words += ["--out", str(tmp_path / "out"), "--max-steps", "2", "--device", "cpu", *SMALL]
        words += [f"--set=data.cache_dir={model / 'cache'}"]
    done = run(words)
    assert done.returncode == 0, f"README.md: `{command}`\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    assert "--help" in words or (tmp_path / "out" / "TinySeek_Pre_final.pkl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in OTHERS if not any(word in c for word in NEEDS_GPU)])
def test_other_commands_run(command, model, tmp_path):
    """As written, but on the model made above. `tests/`, benchmarks and grids have tests of their own: they
    show their help."""
    words = with_texts(shlex.split(command), tmp_path)
    script = script_of(words)
    if script.startswith("tests/") or script in ("train/benchmark.py", "train/ablate.py"):
        words = words[: words.index(script) + 1] + ["--help"]
    elif script == "utils/plot.py":
        words = [
            "python",
            script,
            str(model / "pre_train" / "log.txt"),
            "--out",
            str(tmp_path / "curves.png"),
        ]
    elif script.startswith("inference/"):
        words = [*without(words, "--out", "--checkpoint"), "--out", str(model)]
        if "chat.py" in script and "--prompt" not in words:
            words += ["--prompt", "To be"]
    done = run(words)
    assert done.returncode == 0, f"README.md: `{command}`\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
