"""The commands of README.md and docs/ work: each is run with a small end; those that need a GPU are parsed.

Every fenced block marked `bash` is read, and a `make` target stands for the commands of its recipe. They are
run in the order in which they stand, on a tiny model, with two steps and little data: what one leaves is what
the next begins with. All that is `out/` there is a folder of the test here, and the real one stays as it is.
A text or a file of dialogues that a command names and that is not in the repository is made. What is left,
`make` itself and pip's files, must exist. The first `torchrun` is started as such, the others are parsed; the
rest runs in this process, which saves the start of PyTorch each time, on a part of the standard library.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from config.load import load_config
from load_data.skills.verifiers import REWARDS
from tests.inference.tools import write_checkpoint
from tests.train.tools import ROOT, environment
from train.engine.command import parse_command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_GPU = ("--config gpu_", "--device cuda", "nccl")
STAGES = {
    "pre_train": ("Pre", ()), "sft_train": ("SFT", ("Pre",)), "lora_train": ("Lora", ("SFT", "Pre")),
    "mixlora_train": ("MixLora", ("SFT", "Pre")), "prefix_train": ("Prefix", ("SFT", "Pre")),
    "gate_train": ("Gate", ("SFT", "Pre")), "extend_context": ("Long", ("Pre",)),
    "grpo_train": ("GRPO", ("SFT",)), "ppo_train": ("PPO", ("SFT",)), "dpo_train": ("DPO", ("SFT",)),
    "reward_train": ("Reward", ("SFT",)), "mlm_train": ("MLM", ()), "span_train": ("Span", ()),
    "embed_train": ("Embed", ()), "distill_train": ("Distill", ()),
}  # fmt: skip
SECTIONS = {"mlm_train": ("encoder",), "span_train": ("seq2seq",), "embed_train": ("encoder", "model")}
TEXT = "\n".join(f"To be or not to be, that is question {number}." for number in range(400))
COMMON = ["train.batch_size=2", "train.accumulation_steps=1", "train.eval_batches=1"]
SMALL_MODEL = [
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "model.intermediate_size=32", "model.head_dim=16",
    "tokenizer.vocab_size=400", "tokenizer.train_bytes=100000", "data.limit=60",
    "data.worked_examples=20", "data.sequence_length=32", "data.val_fraction=0.2",
]  # fmt: skip
SMALL_ENCODER = [
    "encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2",
    "encoder.intermediate_size=32", "embed.document_length=64", "embed.query_length=32", *SMALL_MODEL[6:],
]  # fmt: skip
SMALL_SEQ2SEQ = [
    "seq2seq.hidden_size=32", "seq2seq.num_hidden_layers=1", "seq2seq.num_decoder_layers=1",
    "seq2seq.num_attention_heads=2", "seq2seq.intermediate_size=32", "data.skill_samples=40",
    *SMALL_MODEL[6:],
]  # fmt: skip
FEW_DIALOGUES = ["data.skill_samples=40", "data.val_fraction=0.2"]
FEW_SAMPLES = ["rl.prompts=2", "rl.group_size=3", "rl.max_new_tokens=4", "rl.updates=1"]
LITTLE_TEXT = ["data.limit=60", "data.worked_examples=20", "data.val_fraction=0.2"]


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


def recipes(makefile: str) -> dict[str, list[str]]:
    """The commands of each target of a Makefile that run Python, as they would be typed."""
    found, target = {}, None
    for line in makefile.splitlines():
        if match := re.match(r"([\w-]+):", line):
            target = match[1]
        elif line.startswith("\t") and target and "$(BIN)/python" in line:
            found.setdefault(target, []).append(line.strip().replace("$(BIN)/", "").replace(" $(ARGS)", ""))
    return found


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS = list(dict.fromkeys(one for page in PAGES for one in commands(page.read_text(encoding="utf-8"))))
SPELLED = [one for command in COMMANDS
           for one in (recipes(MAKEFILE).get(command.removeprefix("make "), [command]))]  # fmt: skip
OURS = [command for command in dict.fromkeys(SPELLED) if script_of(shlex.split(command))]


def stage_of(words: list[str]) -> str | None:
    """The training stage that a command runs."""
    path = Path(script_of(words) or "")
    return path.stem if path.parent == Path("train") and path.stem in STAGES else None


TRAINING = [command for command in OURS if stage_of(shlex.split(command))]
SHORTEST_PATH = "python train/minimal.py"
RUN_HERE = [SHORTEST_PATH, *(one for one in OURS if not any(word in one for word in (*NEEDS_GPU, "minimal")))]
MORE_TORCHRUN = [command for command in RUN_HERE if command.startswith("torchrun")][1:]  # the same launcher
RUN_HERE = [command for command in RUN_HERE if command not in MORE_TORCHRUN]


def test_the_reader_of_blocks_can_fail():
    """It finds commands in all their spellings; otherwise the tests below would test nothing."""
    text = "```bash\n$ python a.py --x 1  # why\n\ntorchrun --nproc_per_node 2 \\\n  b.py\n# no\n```\n"
    text += "```\npython c.py\n```"
    assert commands(text) == ["python a.py --x 1", "torchrun --nproc_per_node 2    b.py"]
    assert script_of(shlex.split("torchrun --nproc_per_node 2 b.py --data x.txt")) == "b.py"
    assert script_of(shlex.split("python -m modules.rope")) == "modules/rope.py"
    assert script_of(shlex.split("python -m pip install x")) is None and script_of(["make"]) is None
    assert recipes("a: b\n\t$(BIN)/python x.py --y\n\techo\nb:\n\tcc") == {"a": ["python x.py --y"]}
    assert stage_of(["python", "train/sft_train.py"]) == "sft_train"
    assert stage_of(["python", "train/lab/ablate.py"]) is None


def test_there_are_commands():
    assert {stage_of(shlex.split(command)) for command in TRAINING} == STAGES.keys()
    assert any("chat.py" in command for command in OURS) and any("make" in command for command in COMMANDS)


def test_what_the_commands_name_exists():
    """Scripts, modules, requirement files, presets, make targets and the scripts of their recipes."""
    targets = re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)
    for command in [*COMMANDS, *(f"make {target}" for target in recipes(MAKEFILE))]:
        words = shlex.split(command)
        if script := script_of(words):
            assert (ROOT / script).is_file(), f"`{command}`: there is no {script}"
        for flag, value in zip(words, words[1:]):
            if flag == "-r":
                assert (ROOT / value).is_file(), f"`{command}`: there is no {value}"
            if flag == "--config" and not value.endswith(".json"):
                load_config(value, stage=stage_of(words) or "pre_train")
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), f"`{command}`: no such target"
            for line in recipes(MAKEFILE).get(words[1], []):
                name = script_of(shlex.split(line))
                assert name is None or (ROOT / name).is_file(), f"Makefile: `{line}`: there is no {name}"


def test_what_the_pages_name_exists():
    """Links, pictures and files in backticks; and README.md fits on five screens."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    folders = "config|modules|model|load_data|train|inference|utils|tests|docs"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: no {target}"
        for name in re.findall(rf"`((?:{folders})/[\w/]*\.\w+)`", text):
            assert (ROOT / name).is_file(), f"{page.name}: there is no {name}"


def with_files(words: list[str], folder: Path) -> list[str]:
    """The same words; what is not there is made in `folder`, and so is all that is in `out/`."""
    words = [re.sub(r"(?<![-\w./])out(?=/|$)", (folder / "out").as_posix(), word) for word in words]
    for place, word in enumerate(words):
        made = folder / Path(word).name
        if word.endswith((".txt", ".jsonl")) and "/" not in word and not (ROOT / word).exists():
            made.write_text(TEXT if word.endswith(".txt") else dialogues(word), encoding="utf-8")
            words[place] = str(made)
    return words


def dialogues(name: str) -> str:
    """A file of short dialogues, others for another name."""
    lines = []
    for number in range(60):
        turns = (("user", f"{name} {number}?"), ("assistant", f"|{name}|{number}||"))
        lines.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return "".join(json.dumps(line) + "\n" for line in lines)


def without(words: list[str], *flags: str) -> list[str]:
    """The same words less some flags and the value of each."""
    kept, skip = [], False
    for word in words:
        if not skip and word not in flags:
            kept.append(word)
        skip = not skip and word in flags
    return kept


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_are_parsed(command, tmp_path):
    """Every one, those for GPUs too: its flags exist and its settings are right."""
    words = shlex.split(command)
    stage = stage_of(words)
    short, bases = STAGES[stage]
    arguments = words[words.index(f"train/{stage}.py") + 1 :]
    if "--help" in arguments:
        return
    init = arguments[arguments.index("--init") + 1] if "--init" in arguments else ""
    assert not init or init.startswith("out/"), f"`{command}`: where does {init} come from?"
    flags = [*without(arguments, "--out", "--init"), "--out", str(tmp_path / "new")]
    if bases:
        flags += ["--init", str(write_checkpoint(tmp_path / "base.pkl"))]
    parse_command(stage, short, "", flags, bases, sections=SECTIONS.get(stage, ("model",)))


@pytest.fixture(scope="module")
def home(part_of_the_library, tmp_path_factory):
    """A folder whose out/ takes the place of the real one."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(home, monkeypatch, capfd):
    """Runs a command from the repository root, and returns what it said."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("train.engine.command.ROOT", home)  # where stages write and look for a base
    monkeypatch.setattr("load_data.chat.chat_data.VAL_PER_SKILL", 3)
    monkeypatch.setattr("train.engine.fine_tuning.SCORED", 2)
    monkeypatch.setattr("train.engine.policy_stage.HELD_OUT", 4)
    # An untrained model is never right, and learns nothing from rewards that are all 0.
    monkeypatch.setitem(REWARDS, "right", lambda item, text: zlib.crc32(text.encode()) % 97 / 97)

    def call(words):
        if words[0] == "torchrun":
            program = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
            done = subprocess.run(program, env=environment(), timeout=120, check=False)
            return done.returncode, *capfd.readouterr()
        module = words[1] == "-m"
        monkeypatch.setattr(sys, "argv", words[2:] if module else words[1:])
        with open("/dev/null" if sys.platform != "win32" else "NUL", encoding="utf-8") as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            try:
                if module:
                    runpy.run_module(words[2], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(words[1], run_name="__main__")
                code = 0
            except SystemExit as ended:
                code = ended.code or 0
        return code, *capfd.readouterr()

    return call


def a_text(folder: Path) -> str:
    """The path of a short text, for a command that would read the whole standard library."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(folder / "text.txt")


def some_pairs(folder: Path) -> str:
    """The path of a few pairs of answers."""
    lines = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(folder / "pairs.jsonl")


def small(words: list[str], home: Path) -> list[str]:
    """The command as it is run here."""
    words, script, stage = with_files(words, home), script_of(words), stage_of(words)
    others = ("tests/", "train/lab/")
    if script.startswith(others) or "--help" in words:
        return [*words[: words.index(script) + 1], "--help"]  # these have tests of their own
    if stage:
        words = without(words, "--max-steps", "--max-seconds", "--limit", "--nproc_per_node")
        if words[0] == "torchrun":
            words = ["torchrun", "--nproc_per_node", "2", *words[1:]]
            assert "--out" in words, "of another process the test does not know where it writes by default"
            words += [] if "--data" in words else ["--data", a_text(home)]
        if stage in ("dpo_train", "reward_train") and "--data" not in words:
            words += ["--data", some_pairs(home)]  # an untrained model has no right answer to make a pair of
        own = {"pre_train": SMALL_MODEL, "extend_context": LITTLE_TEXT}
        own |= dict.fromkeys(("grpo_train", "ppo_train"), FEW_SAMPLES)
        own["reward_train"] = ["train.dtype=fp32"]  # bf16 rounds away what two steps of training changed
        own["distill_train"] = LITTLE_TEXT if "skills" not in words else FEW_DIALOGUES
        own |= {"mlm_train": SMALL_ENCODER, "embed_train": SMALL_ENCODER, "span_train": SMALL_SEQ2SEQ}
        settings = [*COMMON, *own.get(stage, FEW_DIALOGUES)]
        settings += [f"data.cache_dir={home / 'cache'}"]
        words += ["--max-steps", "2", "--device", "cpu", *(f"--set={setting}" for setting in settings)]
        return words if "--resume" in words else [*words, "--overwrite"]
    if script == "train/minimal.py":
        words += [] if "--data" in words else ["--data", a_text(home)]
        return [*without(words, "--steps", "--seconds"), "--steps", "2"]
    if script.startswith("inference/") and not {"--out", "--checkpoint", "--adapter", "--gate"} & {*words}:
        words += ["--out", str(home / "out")]
    if script == "inference/chat.py":
        words = [*without(words, "--max-new-tokens"), "--max-new-tokens", "8"]
        words += [] if "--prompt" in words else ["--prompt", "To be"]
    if script == "inference/evaluate.py":
        words = [*without(words, "--count"), "--count", "2"]
    if script == "inference/long_context.py":
        words = [*without(words, "--lengths", "--count", "--depths", "--windows"), "--lengths", "300"]
        words += ["--count", "1", "--depths", "2", "--windows", "1"]
    if script == "load_data/show.py" and "--checkpoint" not in words:
        words += ["--checkpoint", str(home / "out" / "TinySeek_SFT_final.pkl")]
    if script == "utils/plot.py" and not any(word.endswith(".txt") for word in words):
        words += [str(home / "out" / "pre_train" / "log.txt")]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_HERE)
def test_commands_run(command, home, run, monkeypatch):
    """As they are written, but small; with `-k`, name those that make what a command needs, too."""
    words = small(shlex.split(command), home)
    if "export_gguf" in command:
        pytest.importorskip("gguf")
    if command != TRAINING[0]:  # pictures take longer than two steps
        monkeypatch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)
        for name in ("load", "tokens"):
            monkeypatch.setattr(f"utils.plot_experts.plot_expert_{name}", lambda *given: None)
    before = results(home)
    code, output, error = run(words)
    assert code == 0, f"`{command}`\n{output[-1500:]}\n{error[-1500:]}"
    if (stage := stage_of(words)) and "--help" not in words:
        new = {path.name for path, when in results(home).items() if before.get(path) != when}
        short = STAGES[stage][0] + "Lora" * any(word.endswith(".lora=true") for word in words)
        assert new == {f"TinySeek_{short}_final.pkl"}, f"`{command}`: no result in out/"


def results(home: Path) -> dict[Path, int]:
    """The results that are there, and from when."""
    return {path: path.stat().st_mtime_ns for path in home.rglob("TinySeek_*_final.pkl")}
