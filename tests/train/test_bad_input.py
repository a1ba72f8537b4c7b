"""Bad input to training: exit code 2, exactly one line on standard error, and nothing overwritten.

Every case runs with --overwrite over a finished run, whose files must stay byte for byte: what is wrong must
be noticed before anything is removed. Most run within this process, through the same `run_main` as the
script.
"""

import sys
from pathlib import Path

import pytest
import torch

from config.load import preset_names
from inference.generation.load import CHAT_STAGES
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.processes import fork, without_pictures
from tests.train.tools import PRE_TRAIN, run
from train import dpo_train, gate_train, grpo_train, lora_train, mixlora_train, ppo_train, pre_train
from train import prefix_train, reward_train, sft_train
from train.engine.command import parse_command
from utils import checkpoint
from utils.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from utils.errors import run_main

TEXT = "\n".join(f"def line_{number}(x):\n    return x + {number}" for number in range(150))
QUICK = ("--set", "tokenizer.kind=char", "--set", "train.batch_size=2", "--max-steps", "2", "--device", "cpu")


def files_in(folder) -> dict[Path, bytes]:
    """Every file of a folder with its content."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A folder with text.txt, cache/, and a finished run in out/."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)
        code = call_main(patch, folder, "--data", folder / "text.txt", *QUICK, "--out", folder / "out")
    assert code == 0
    return folder


def call_main(monkeypatch, folder, *arguments):
    """`python train/pre_train.py --config tiny ARGUMENTS` within this process; returns the exit code."""
    config = [] if "--config" in arguments else ["--config", "tiny"]
    cache = ["--set", f"data.cache_dir={folder / 'cache'}"]
    monkeypatch.setattr(sys, "argv", ["pre_train.py", *config, *cache, *map(str, arguments)])
    monkeypatch.setattr(pre_train, "show_samples", lambda *arguments: None)
    with pytest.raises(SystemExit) as caught:
        run_main(pre_train.main)
    return caught.value.code


@pytest.fixture
def refused(old_run, monkeypatch, capsys):
    """Calls main with the arguments of a case; returns its one line of error."""

    def call(*arguments, overwrite=True):
        out = [] if "--out" in arguments else ["--out", old_run / "out"]
        data = [] if "--data" in arguments else ["--data", old_run / "text.txt"]
        again = ["--overwrite"] if overwrite else []
        before = files_in(old_run / "out")
        capsys.readouterr()
        code = call_main(monkeypatch, old_run, *QUICK, *out, *data, *again, *arguments)
        error = capsys.readouterr().err
        assert code == 2, error
        (line,) = error.splitlines()
        assert line.startswith("error: ") and "Traceback" not in error
        assert files_in(old_run / "out") == before
        return line

    return call


def test_the_good_case_is_good(old_run, monkeypatch):
    """The cases below are refused for what is wrong with them, and not for something else."""
    arguments = ["--data", old_run / "text.txt", "--out", old_run / "again", *QUICK]
    assert call_main(monkeypatch, old_run, *arguments) == 0
    assert call_main(monkeypatch, old_run, *arguments, "--overwrite") == 0


# --------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, "gone.txt: no such file or folder"),
        ("empty.txt", b"", "empty.txt: nothing to read"),
        ("blank.jsonl", b"\n\n", "no training text"),
        ("binary.txt", b"text\nmore\n\x00\x01", "binary.txt, line 3: a NUL byte"),
        ("latin.txt", "one\ntwo\ncaf\u00e9".encode("latin-1"), "latin.txt, line 3: not UTF-8"),
        ("torn.jsonl", b'\n{"text": "b\n', "torn.jsonl, line 2: not valid JSON"),
        ("list.jsonl", b'\n\n["b"]\n', "list.jsonl, line 3: each line must hold"),
        ("shape.jsonl", b'\n{"content": "b"}\n', "shape.jsonl, line 2: a record of unknown"),
        ("number.jsonl", b'{"text": 5}\n', "number.jsonl, line 1: text must be a text, not 5"),
        ("role.jsonl", b'{"messages": [{"role": "god", "content": "x"}]}\n', "line 1: message 1 of mess"),
        ("turns.jsonl", b'{"conversations": "hello"}\n', "line 1: conversations must be a list"),
        ("table.csv", b"a,b\n", "table.csv: nothing to read; .txt and .jsonl files"),
        ("one.jsonl", b'{"text": "the only document"}\n', "there is no validation text"),
        ("short.txt", b"too short for one window of sixty-four tokens", "data.sequence_length"),
    ],
)
def test_bad_data(refused, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert words in refused("--data", tmp_path / name)


def test_an_empty_folder_and_a_bad_file_in_a_folder(refused, tmp_path):
    assert "nothing to read" in refused("--data", tmp_path)
    (tmp_path / "good.jsonl").write_text('{"text": "fine"}\n' * 5, encoding="utf-8")
    (tmp_path / "torn.jsonl").write_text('\n{"te', encoding="utf-8")
    assert "torn.jsonl, line 2: not valid JSON" in refused("--data", tmp_path)


# ----------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "modle.hidden_size=8"], "unknown section 'modle'; did you mean model?"),
        (["--set", "model.hiden_size=8"], "did you mean hidden_size?"),
        (["--set", "optim.lr=fast"], "optim.lr must be float, not 'fast'"),
        (["--set", "train.batch_size=2.5"], "train.batch_size must be int, not 2.5"),
        (["--set", "train.batch_size"], "write it as section.key=value"),
        (["--set", "model.head_dim=7"], "model.head_dim=7 is odd"),
        (["--set", "model.num_attention_heads=5"], "is not divisible"),
        (["--set", "model.num_key_value_heads=3"], "is not divisible"),
        (["--set", "model.vocab_size=5"], "model.vocab_size=5"),
        (["--set", 'model.rope_scaling={"rope_type": "elastic"}'], "rope_scaling"),
        (["--set", 'model.rope_scaling={"rope_type": "linear"}'], "factor"),
        (["--set", "model.rope_scaling=7"], "model.rope_scaling must be dict or null"),
        (["--set", "data.sequence_length=100000"], "data.sequence_length=100000"),
        (["--set", "data.val_fraction=1.5"], "data.val_fraction=1.5 must be below 1"),
        (["--set", "optim.schedule=linear"], "must be one of cosine, exponential, wsd"),
        (["--set", "train.dtype=fp16"], "train.dtype=fp16 is for CUDA"),
        (["--config", "huge"], "--config huge: no such preset; presets: "),
        (["--config", "gone.json"], "--config gone.json: no such file"),
        (["--max-steps", "0"], "train.max_steps=0 must be at least 1"),
        (["--max-steps", "many"], "--max-steps: invalid int value: 'many'"),
        (["--max-seconds", "-1"], "train.max_seconds=-1.0 must be above 0"),
        (["--seed", "-1"], "train.seed=-1 must be at least 0"),
        (["--limit", "0"], "data.limit=0 must be at least 1"),
        (["--device", "abacus"], "--device: invalid choice: 'abacus'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1; --help lists the flags"),
        (["--resume"], "--resume and --overwrite exclude each other"),
        (["--out", __file__], "is a file; name a folder"),
    ],
    ids=lambda value: " ".join(value[:2])[:50] if isinstance(value, list) else "",
)
def test_bad_settings(refused, arguments, words):
    assert words in refused(*arguments)


def test_a_bad_configuration_file(refused, tmp_path):
    (tmp_path / "c.json").write_text('{"train": {"max_steps": 2,}}', encoding="utf-8")
    line = refused("--config", tmp_path / "c.json")
    assert "c.json: cannot be read as JSON" in line and "line 1 column 27" in line
    (tmp_path / "c.json").write_text('{"train": {"max_step": 2}}', encoding="utf-8")
    assert "did you mean max_steps?" in refused("--config", tmp_path / "c.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(refused):
    assert "--device cuda: this PyTorch" in refused("--device", "cuda")


# -------------------------------------------------------------------------------------------- checkpoints


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_bad_checkpoint_to_start_from(refused, old_run, tmp_path):
    """Missing, no checkpoint, cut short, with code in it, without weights, of another shape."""
    final, bad = old_run / "out" / "TinySeek_Pre_final.pkl", tmp_path / "bad.pkl"
    assert "bad.pkl: no such checkpoint" in refused("--init", bad)
    bad.write_text("hello", encoding="utf-8")
    assert "not a TinySeek checkpoint" in refused("--init", bad)
    bad.write_bytes(final.read_bytes()[:-2000])
    assert "bad.pkl: the checkpoint is cut short" in refused("--init", bad)
    torch.save({"format_version": 1, "weights": Evil(tmp_path / "made_by_evil")}, bad)
    assert "bad.pkl: refused, it carries code" in refused("--init", bad)
    assert not (tmp_path / "made_by_evil").exists()
    save_checkpoint(bad, {"weights": {}})
    assert "a checkpoint without config, tokenizer" in refused("--init", bad)
    assert "(16, 32) where the model has (8, 32)" in refused("--init", final, "--set", "model.head_dim=4")
    save_checkpoint(bad, {"weights": {}, "tokenizer": "", "config": {"model": {}}})
    assert "a checkpoint without config.tokenizer" in refused("--init", bad)
    data = load_checkpoint(final)
    del data["weights"]["model.norm.weight"]
    save_checkpoint(bad, data)
    assert "1 missing (model.norm.weight)" in refused("--init", bad)


def test_a_run_is_not_overwritten_unasked(refused, old_run, tmp_path):
    """Neither a finished one, nor an unfinished one, nor one whose way to its end is lost."""
    line = refused(overwrite=False)
    assert "finished run of pre_train" in line and "--resume" in line and "--overwrite" in line
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    newest = find_checkpoints(old_run / "out", "Pre")[-1]
    (unfinished / newest.name).write_bytes(newest.read_bytes())
    line = refused("--out", unfinished, overwrite=False)
    assert "unfinished run of pre_train" in line and newest.name in line and "--resume" in line
    final = tmp_path / "final"
    final.mkdir()
    (final / "TinySeek_Pre_final.pkl").write_bytes((old_run / "out" / "TinySeek_Pre_final.pkl").read_bytes())
    before = files_in(tmp_path)
    assert "no checkpoint beside it to resume from" in refused("--out", final, "--resume", overwrite=False)
    assert files_in(tmp_path) == before


def test_resuming_with_other_settings_or_data_is_refused(refused, tmp_path):
    assert "optim.lr=0.005, this command says 0.1" in refused(
        "--resume", "--max-steps", "5", "--set", "optim.lr=0.1", overwrite=False
    )
    assert "optim.optimizer=adamw" in refused("--resume", "--set", "optim.optimizer=muon", overwrite=False)
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1], encoding="utf-8")
    assert "trained on other data" in refused("--resume", "--data", other, overwrite=False)


def test_a_damaged_newest_checkpoint_is_one_line(refused, old_run, tmp_path):
    for path in (old_run / "out").glob("*.pkl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    newest = find_checkpoints(tmp_path, "Pre")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    line = refused("--out", tmp_path, "--resume", overwrite=False)
    assert newest.name in line and "the one before is good" in line


# ------------------------------------------------------------------------------------------- fine-tuning

SHORTS = {sft_train: "SFT", lora_train: "Lora", mixlora_train: "MixLora", prefix_train: "Prefix",
          gate_train: "Gate", grpo_train: "GRPO", ppo_train: "PPO", dpo_train: "DPO",
          reward_train: "Reward"}  # fmt: skip
POLICIES, PAIRED = (grpo_train, ppo_train), (dpo_train, reward_train)
DATA = dict.fromkeys(POLICIES, "skills:sums") | dict.fromkeys(PAIRED, "pairs.jsonl")
ADAPTERS = (lora_train, mixlora_train, prefix_train)
PAIR = '{"prompt": "say %d", "chosen": "%d", "rejected": "no"}\n'
TURN = '{"messages": [{"role": "user", "content": "say %d"}, {"role": "assistant", "content": "%d"}]}\n'


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with dialogues.jsonl, pairs.jsonl, random models, and finished runs of no content in out/."""
    folder = tmp_path_factory.mktemp("bases")
    lines = [TURN % (number, number) for number in range(60)]
    (folder / "dialogues.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = [PAIR % (number, number) for number in range(60)]
    (folder / "pairs.jsonl").write_text("".join(pairs), encoding="utf-8")
    write_checkpoint(folder / "Pre.pkl", "Pre")
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    for name, changes in (("SFT", {}), ("unshared", experts | {"n_shared_experts": 0})):
        model = tiny_model(**changes)
        saved = {"weights": model.state_dict(), "config": run_config(model)}
        write_checkpoint(folder / f"{name}.pkl", "SFT", **saved)
    for short in SHORTS.values():
        save_checkpoint(folder / "out" / f"TinySeek_{short}_final.pkl", {"short": short})
    return folder


@pytest.fixture
def refuse(bases, tmp_path, monkeypatch, capsys):
    """Calls main of a stage with the arguments of a case, over a finished run of that stage; returns its one
    line of error."""
    monkeypatch.setattr("train.engine.command.ROOT", bases / "empty")

    def call(stage, *arguments, overwrite=True):
        data = DATA.get(stage, "dialogues.jsonl")
        data = data if stage in POLICIES else bases / data
        flags = [] if "--data" in arguments else ["--data", data]
        flags += [] if "--init" in arguments or None in arguments else ["--init", bases / "SFT.pkl"]
        flags += [] if "--out" in arguments else ["--out", bases / "out"]
        flags += ["--overwrite"] if overwrite else []
        flags += ["--device", "cpu", "--set", "train.dtype=fp32", "--set", "data.sequence_length=48"]
        flags += ["--set", "prefix.length=16", "--set", "rl.max_new_tokens=4", "--set", "pairs.prompts=8"]
        flags += ["--set", f"data.cache_dir={tmp_path / 'cache'}"]
        flags += filter(None, arguments)
        if "--max-steps" not in arguments:
            flags += ["--max-steps", "2"]
        monkeypatch.setattr(sys, "argv", [stage.STAGE, *map(str, flags)])
        before = files_in(bases)
        with pytest.raises(SystemExit) as caught:
            run_main(stage.main)
        error = capsys.readouterr().err
        assert caught.value.code == 2, error
        (line,) = error.splitlines()
        assert line.startswith("error: ") and "Traceback" not in error
        assert files_in(bases) == before
        return line

    return call


@pytest.mark.parametrize("stage", SHORTS, ids=SHORTS.values())
def test_bad_calls_of_every_stage(refuse, bases, tmp_path, stage):
    presets = ", ".join(preset_names(stage.__name__.removeprefix("train.")))
    assert f"--config laptop: no such preset; presets: {presets}" in refuse(stage, "--config", "laptop")
    assert "bad.pkl: no such checkpoint" in refuse(stage, "--init", tmp_path / "bad.pkl")
    candidates = ["--set", 'gate.candidates=["base", "base"]']
    line = refuse(stage, "--data", "python", *candidates)
    judged = "no questions that a rule can judge; name skills:sums"
    assert f"--data python: {judged if stage in POLICIES else 'plain text is for train/pre_train.py'}" in line
    line = refuse(stage, overwrite=False)
    use = {"Gate": "chat.py --gate ", "Reward": "grpo_train.py --set rl.reward="}
    use |= dict.fromkeys(CHAT_STAGES, "chat.py --out ")
    use = use.get(SHORTS[stage], "chat.py --adapter ")
    assert f"is a finished run of {stage.STAGE}" in line and use in line and "--overwrite" in line
    line = refuse(stage, None, "--out", tmp_path / "new")  # without --init, and nothing to find
    base = "SFT" if stage in (*POLICIES, *PAIRED) else "Pre"
    assert f"no TinySeek_{base}_final.pkl in" in line and "--init" in line
    assert f"train/{base.lower()}_train.py" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, "gone.jsonl: no such file or folder; built in are python"),
        ("book.txt", b"once upon a time", "book.txt: plain text is for train/pre_train.py"),
        ("text.jsonl", b'{"text": "once"}\n', "text.jsonl, line 1: "),
        ("none.jsonl", b"\n\n", "there is no training text"),
        ("few.jsonl", (TURN % (1, 1)).encode(), "there is no training text"),
        ("empty.jsonl", b'{"messages": []}\n', "line 1: messages must be a list of at least one message"),
        ("asked.jsonl", b'{"messages": [{"role": "user", "content": "?"}]}\n', "no assistant message"),
        (
            "turns.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x"}]}\n',
            "has role assistant where",
        ),
    ],
)
def test_bad_dialogues(refuse, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert words in refuse(sft_train, "--data", tmp_path / name)


@pytest.mark.parametrize(
    ("stage", "arguments", "words"),
    [
        (sft_train, ["--data", "skills:naps"], "unknown skill 'naps'; skills: identity, arithmetic"),
        (sft_train, ["--set", "data.template=llama"], "must be one of tinyseek, chatml"),
        (sft_train, ["--set", "data.sequence_length=3"], "data.sequence_length=3 is too short"),
        (sft_train, ["--set", "model.hidden_size=8"], "does not fit this model"),
        (sft_train, ["--limit", "1"], "there is no training text"),
        (lora_train, ["--set", 'lora.target_modules=["nose"]'], "nothing is called 'nose'; this model has"),
        (lora_train, ["--set", 'lora.target_modules=["experts"]'], "matches nothing in this model"),
        (lora_train, ["--set", 'lora.target_modules=["lm_head"]'], "no adapter on lm_head"),
        (lora_train, ["--set", "lora.target_modules=[]"], "lora.target_modules is empty"),
        (lora_train, ["--set", "lora.target_modules=attention"], "must be list, not 'attention'"),
        (lora_train, ["--set", "lora.r=0"], "lora.r=0 must be at least 1"),
        (lora_train, ["--set", "lora.rank=4"], "unknown setting of section lora 'rank'"),
        (sft_train, ["--set", "data.sequence_length=65"], "more than model.max_position_embeddings=64"),
        (lora_train, ["--set", "model.rope_theta=77"], "model.rope_theta=77.0 is not what the base was"),
        (gate_train, ["--set", "model.rope_theta=77"], "model.rope_theta=77.0 is not what the base was"),
        (mixlora_train, ["--set", "mixlora.num_experts=1"], "mixlora.num_experts=1 must be at least 2"),
        (mixlora_train, ["--set", "mixlora.num_experts_per_tok=1"], "use two experts or more"),
        (prefix_train, ["--set", "prefix.length=64"], "prefix.length=64 leaves no room"),
        (prefix_train, ["--set", "prefix.length=20"], "behind a prefix of 20 is more than model.max"),
        (prefix_train, ["--set", "prefix.kind=suffix"], "must be one of prefix, prompt"),
        (gate_train, [], "so there is nothing to choose from: train one with"),
        (gate_train, ["--set", 'gate.candidates=["base", "gone.pkl"]'], "gone.pkl: no such checkpoint"),
        (gate_train, ["--set", 'gate.candidates=["base"]'], "needs at least two candidates"),
    ],
)
def test_bad_settings_of_fine_tuning(refuse, stage, arguments, words):
    assert words in refuse(stage, *arguments)


# --- alignment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "arguments", "words"),
    [
        ((*POLICIES, *PAIRED), ["--data", "skills:naps"], "unknown skill 'naps'; skills: identity, arithm"),
        (POLICIES, ["--data", "skills:sums", "python"], "--data python: no questions that a rule can judge"),
        (POLICIES, ["--set", "rl.recipe=grpoo"], "must be one of rft, rloo, ppo, grpo, dr_grpo"),
        (POLICIES, ["--set", "rl.recipe=grpo", "--set", "rl.group_size=1"], "rl.group_size=1: advantage"),
        (POLICIES, ["--set", "rl.max_new_tokens=20"], "no room for a question of 34 tokens beside an answer"),
        (POLICIES, ["--set", "data.sequence_length=65"], "more than model.max_position_embeddings=64"),
        (POLICIES, ["--set", "rl.reward=gone.pkl"], "gone.pkl: no such rule, nor a file; rules: right"),
        (POLICIES, ["--set", "rl.kl=none", "--set", "rl.kl_weight=0.1"], "needs an estimator: set rl.kl=k3"),
        (POLICIES, ["--set", "rl.lora=true", "--set", 'lora.target_modules=["nose"]'], "is called 'nose'"),
        ((grpo_train,), ["--set", "rl.recipe=ppo"], "needs a critic: use train/ppo_train.py"),
        ((ppo_train,), ["--set", "rl.recipe=grpo"], "uses no critic: set rl.recipe=ppo"),
        ((dpo_train,), ["--set", "dpo.kind=kto"], "dpo.kind='kto' must be one of dpo, ipo, simpo, orpo"),
        (PAIRED, ["--set", "pairs.samples=1"], "pairs.samples=1 must be at least 2"),
        (PAIRED, ["--set", "data.sequence_length=3"], "left out: 60 pairs with too long an answer"),
        (PAIRED, ["--limit", "1"], "no pair to"),
    ],
)  # fmt: skip
def test_bad_settings_of_alignment(refuse, stages, arguments, words):
    for stage in stages:
        assert words in refuse(stage, *arguments)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([PAIR % (1, 1), '{"prompt": "a", "cho\n'], "bad.jsonl, line 2: not valid JSON"),
        ([PAIR % (1, 1), "\n", '{"prompt": 5, "chosen": "b", "rejected": "c"}'], "bad.jsonl, line 3: prompt"),
        ([TURN % (1, 1)], 'bad.jsonl, line 1: a pair has "prompt", "chosen" and "rejected"'),
        (['{"prompt": "a", "chosen": "b", "rejected": null}'], "bad.jsonl, line 1: rejected must be a text"),
    ],
)  # fmt: skip
def test_bad_pairs(refuse, tmp_path, lines, words):
    """Records that cannot be read are left out; if too few remain, the error tells which."""
    (tmp_path / "bad.jsonl").write_text("".join(lines), encoding="utf-8")
    for stage in PAIRED:
        assert words in refuse(stage, "--data", tmp_path / "bad.jsonl")


def test_models_that_do_not_fit_alignment(refuse, bases, tmp_path):
    """A model that samples must have learned to answer; a reward comes from a reward model."""
    for stage in (*POLICIES, *PAIRED):
        line = refuse(stage, "--init", bases / "Pre.pkl", "--data", "skills:sums")
        assert "Pre.pkl: a model of pre_train, which was not trained to answer" in line
        assert "train/sft_train.py" in line
    for stage in POLICIES:
        line = refuse(stage, "--set", f"rl.reward={bases / 'SFT.pkl'}")
        assert "SFT.pkl: a full model of sft, not a reward model" in line
        line = refuse(stage, "--set", f"rl.reward={bases / 'pairs.jsonl'}")
        assert "pairs.jsonl: not a TinySeek checkpoint" in line


def test_bases_that_do_not_fit(refuse, bases, tmp_path):
    line = refuse(mixlora_train, "--init", bases / "unshared.pkl")
    assert "layer 0 has none (model.n_shared_experts=0): use another base, or lora" in line
    adapter = tmp_path / "adapter.pkl"
    save_checkpoint(adapter, {"stage": "lora_train", "short": "Lora", "base": {"path": "b", "digest": "d"}})
    for stage in SHORTS:
        assert "adapter" in refuse(stage, "--init", adapter)


@pytest.mark.parametrize("stage", ADAPTERS, ids=[SHORTS[stage] for stage in ADAPTERS])
def test_the_base_that_is_taken_where_none_is_named(stage, tmp_path, monkeypatch):
    """The fine-tuned model before the pre-trained one, and that in --out before that in out/."""
    monkeypatch.setattr("train.engine.command.ROOT", tmp_path)
    made = [
        tmp_path / folder / f"TinySeek_{short}_final.pkl"
        for folder in ("out", "new")
        for short in ("Pre", "SFT")
    ]
    for number, path in enumerate(made):
        path.parent.mkdir(exist_ok=True)
        write_checkpoint(path, path.name.split("_")[1], seed=number)
        flags = ["--out", str(tmp_path / "new")]
        command = parse_command(stage.STAGE, SHORTS[stage], "", flags, ("SFT", "Pre"))
        assert command.init_path == path and command.config.model.hidden_size == 24
    sft = parse_command("sft_train", "X", "", ["--out", str(tmp_path / "new")], ("Pre",))
    assert sft.init_path == made[2]
    assert parse_command(stage.STAGE, "X", "", [], ("SFT", "Pre")).init_path == made[1]


def test_prompt_tuning_from_the_command_line(bases, tmp_path, monkeypatch):
    """The good case beside the bad ones: learned embeddings, whose ids are beyond the vocabulary."""
    flags = ["--data", bases / "dialogues.jsonl", "--init", bases / "SFT.pkl", "--out", tmp_path]
    settings = ["prefix.kind=prompt", "prefix.length=3", "data.sequence_length=48"]
    settings += [f"data.cache_dir={tmp_path}"]
    flags += ["--max-steps", "3", "--device", "cpu", *(f"--set={setting}" for setting in settings)]
    monkeypatch.setattr(sys, "argv", ["prefix_train", *map(str, flags)])
    prefix_train.main()
    saved = load_checkpoint(tmp_path / "TinySeek_Prefix_final.pkl")["weights"]
    assert [tuple(part.shape) for part in saved.values()] == [(9, 24)]  # three roles, three each


# -------------------------------------------------------------------------------------- as real processes


@pytest.mark.slow
def test_the_script_itself(old_run):
    before, words = files_in(old_run / "out"), "--data gone.txt: no such file or folder"
    base = [PRE_TRAIN, "--config", "tiny", "--out", old_run / "out", "--overwrite", "--max-steps", "1"]
    done = run(*base, "--data", "gone.txt")
    assert done.returncode == 2 and done.stdout.count("error") == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert files_in(old_run / "out") == before


def on_a_small_disk(*words):
    """Pre-train where no file may grow beyond 50 kB from the third checkpoint on."""
    import resource

    whole = checkpoint.save_checkpoint

    def save(path, data):
        if data["step"] >= 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        whole(path, data)

    checkpoint.save_checkpoint = save
    without_pictures("train.pre_train", *words)


@pytest.mark.slow
def test_a_full_disk_while_saving(old_run, tmp_path, monkeypatch):
    """The checkpoints before are intact, and resuming goes on."""
    pytest.importorskip("resource")
    out = tmp_path / "out"
    command = [
        "--config", "tiny", "--data", old_run / "text.txt", *QUICK, "--out", out, "--max-steps", "4",
        "--set", "train.save_every=1", "--set", f"data.cache_dir={old_run / 'cache'}",
    ]  # fmt: skip
    done = fork(on_a_small_disk, *command)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: could not write") and "Earlier checkpoints are intact" in line
    names = [path.name for path in sorted(out.glob("*.pkl*"))]  # and no .pkl.tmp
    assert names == ["TinySeek_Pre1_0.pkl", "TinySeek_Pre2_0.pkl"]
    assert [load_checkpoint(path)["step"] for path in find_checkpoints(out, "Pre")] == [1, 2]
    assert call_main(monkeypatch, old_run, *command, "--resume") == 0
    assert load_checkpoint(out / "TinySeek_Pre_final.pkl")["step"] == 4
