"""Distillation as a stage: what it leaves, exact resuming, two processes, the command line and bad input."""

import os
import sys
from dataclasses import replace

import pytest
import torch

from config.load import load_config, preset_names, to_dict
from inference.generation.load import find_model, load_full
from load_data.tokenization.tokenizer import CharTokenizer
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.processes import both_ways
from tests.train.students import ALL, MOE, make_run, make_stage, make_teacher, steps_of, student_config
from tests.train.tools import ListLoader, largest_difference, same_bits, weights_of, without_timing
from train import distill_train
from train.engine.distill_stage import check_same_tokens
from utils import distributed
from utils.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from utils.distributed import World
from utils.errors import UserError, run_main
from utils.log import read_log

FINAL = "TinySeek_Distill_final.pkl"


# --- what is saved ----------------------------------------------------------------------------------------


def parts_in(path) -> set[str]:
    """The first words of all names of weights in a file, at any depth, but for those of a decoder."""
    found = set()

    def search(value):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(part, (dict, list)):
                search(part)
            elif isinstance(key, str) and isinstance(part, torch.Tensor):
                found.add(key.partition(".")[0])

    search(load_checkpoint(path))
    return found - {"model", "lm_head", "mtp", "student"}


def test_the_files_hold_the_student(tmp_path):
    """The result is an ordinary model; on the way the projection is kept beside it, and the teacher never."""
    run = make_run(tmp_path, student_config(*ALL, "train.save_every=2", steps=3), make_teacher())
    run.run()
    student = weights_of(run.model["student"])
    final = load_checkpoint(tmp_path / FINAL)
    assert same_bits(final["weights"], student) and not parts_in(tmp_path / FINAL)
    assert same_bits(load_full(tmp_path / FINAL).model.state_dict(), student)
    way = [path for path in find_checkpoints(tmp_path, "Distill") if path.name != FINAL]
    assert way
    for path in way:
        saved = load_checkpoint(path)
        assert saved["weights"].keys() == student.keys()
        assert {*saved["training"]["others"]} == {f"projection.layers.{n}.weight" for n in (0, 1)}
        assert parts_in(path) - {"step", "exp_avg", "exp_avg_sq"} == {"projection"}


def test_a_projection_that_is_saved_is_seen(tmp_path):
    """A saboteur that presents all that is trained: the file is no model."""
    everything = lambda stage: replace(stage, result=None)  # noqa: E731
    make_run(tmp_path, student_config(*ALL, steps=2), make_teacher(), change=everything).run()
    assert parts_in(tmp_path / FINAL) == {"projection"}
    with pytest.raises(UserError, match="does not fit this model: weights 25 missing .*; 27 unexpected"):
        load_full(tmp_path / FINAL)


class Stop(Exception):
    """Stands in for a crash."""


def test_a_run_that_was_stopped_resumes_exactly(tmp_path):
    """With dropout, experts, and a projection that is on its way."""
    settings = (*ALL, *MOE, "distill.top_k=4", "train.save_every=2", "model.dropout=0.1")
    config = student_config(*settings, steps=5)
    torch.manual_seed(0)
    whole = make_run(tmp_path / "a", config, make_teacher())
    whole.run()
    torch.manual_seed(0)
    stopped = make_run(tmp_path / "b", config, make_teacher())
    update, taken = stopped.update, []

    def stop(witness):
        taken.append(update(witness))
        if len(taken) == 4:
            raise Stop
        return taken[-1]

    stopped.update = stop
    with pytest.raises(Stop):
        stopped.run()
    torch.manual_seed(7)  # other numbers in the projection, until they are restored
    rest = make_run(tmp_path / "b", config, make_teacher(), resume=True)
    assert rest.step == 2
    rest.run()
    assert same_bits(whole.model.state_dict(), rest.model.state_dict())
    logs = [read_log(tmp_path / name / "toy" / "log.txt") for name in "ab"]
    assert without_timing(logs[0]) == without_timing(logs[1])
    with pytest.raises(UserError, match="was trained with other frozen models: name the same ones"):
        make_run(tmp_path / "b", config, make_teacher(seed=3), resume=True)


def train_in(out):
    """One of two processes, each with two of four rows; or the only one, with all of them."""
    world = distributed.start() if "RANK" in os.environ else World()
    steps = steps_of()
    if world.size > 1:
        steps = [step[world.rank :: world.size] for step in steps]
    torch.manual_seed(0)
    config = student_config(*ALL, *MOE, "balance.statistics=exact")
    run = make_run(out, config, make_teacher(), loader=ListLoader(steps), world=world)
    run.run()
    if world.is_first:
        torch.save(weights_of(run.model), out / "seen.pt")
    distributed.finish()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one, two = both_ways(train_in, tmp_path)
    assert largest_difference(one, two) < 1e-5
    torch.manual_seed(0)
    start = weights_of(make_stage(student_config(*ALL, *MOE), make_teacher()).model)
    assert largest_difference(one, start) > 1e-3


# --- the command line -------------------------------------------------------------------------------------

TEXT = "\n".join(f"def line_{number}(x):\n    return x + {number}" for number in range(150))
TURN = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "%d!"}]}\n'
SMALL = {
    "data.sequence_length": 32, "data.start_length": "null", "train.batch_size": 2, "train.eval_batches": 1,
    "train.dtype": "fp32", "optim.warmup_steps": 0, "data.val_fraction": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with texts, dialogues, and teachers: of text with experts, of dialogues, and others."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "chat.jsonl").write_text("".join(TURN % (n, n) for n in range(60)), encoding="utf-8")
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    for name, short, changes in (("Pre", "Pre", experts), ("SFT", "SFT", {}),
                                 ("latent", "Pre", {"attention_kind": "mla"}),
                                 ("narrow", "Pre", {"max_position_embeddings": 16})):  # fmt: skip
        model = tiny_model(2, **changes)
        path = folder / "out" / f"TinySeek_{name}_final.pkl" if name == short else folder / f"{name}.pkl"
        write_checkpoint(path, short, weights=model.state_dict(), config=run_config(model))
    save_checkpoint(folder / "adapter.pkl", {"short": "Lora", "base": {"path": "x", "digest": "y"}})
    other = tiny_model(2)
    write_checkpoint(folder / "letters.pkl", "Pre", weights=other.state_dict(), config=run_config(other),
                     tokenizer=CharTokenizer("abc").to_json())  # fmt: skip
    return folder


@pytest.fixture
def call(home, monkeypatch, capsys):
    """Runs the script within this process; returns its exit code, its output and its errors."""
    monkeypatch.setattr("train.engine.command.ROOT", home)
    monkeypatch.setattr("train.engine.fine_tuning.SCORED_DIALOGUES", 2)

    def run(*words, data="text.txt", steps=2, **settings):
        flags = ["--data", home / data, "--device", "cpu", "--max-steps", steps, *words]
        settings = SMALL | {"data.cache_dir": home / "cache"} | settings
        flags += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        monkeypatch.setattr(sys, "argv", ["distill_train", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_main(distill_train.main)
        return caught.value.code, *capsys.readouterr()

    return run


def test_on_text_then_on_dialogues(call, home, tmp_path):
    """The default teachers of both; experts to dense; the student has their tokenizer, and chats at last."""
    code, said, error = call("--out", tmp_path)
    assert code == 0, error
    assert f"teacher: {home / 'out' / 'TinySeek_Pre_final.pkl'}" in said and "logits trains" in said
    assert f"next: python inference/chat.py --checkpoint {tmp_path / FINAL}" in said
    first = load_full(tmp_path / FINAL)
    assert not first.answers and first.config.model.n_routed_experts == 0
    assert first.tokenizer.digest == load_full(home / "out" / "TinySeek_Pre_final.pkl").tokenizer.digest
    flags = ("--config", "skills", "--init", tmp_path / FINAL, "--out", tmp_path / "b")
    code, said, error = call(*flags, data="chat.jsonl", steps=3, **{"distill.attention": "relations"})
    assert code == 0, error
    assert f"teacher: {home / 'out' / 'TinySeek_SFT_final.pkl'}" in said and "attention trains" in said
    assert "exact" in said  # scored before and after
    second = load_full(tmp_path / "b" / FINAL)
    assert second.answers and second.config.model == first.config.model
    assert find_model(tmp_path) == tmp_path / FINAL
    write_checkpoint(tmp_path / "TinySeek_Pre_final.pkl")
    assert find_model(tmp_path).name == "TinySeek_Pre_final.pkl"  # the larger model first


def test_a_student_with_experts_of_a_dense_teacher(call, home, tmp_path):
    settings = dict(setting.split("=") for setting in MOE) | {"distill.hidden": "cosine"}
    settings["distill.teacher"] = home / "out" / "TinySeek_SFT_final.pkl"
    code, said, error = call("--out", tmp_path, steps=3, **settings)
    assert code == 0 and "hidden trains" in said, error


@pytest.mark.parametrize(("words", "settings", "message"), [
    ([], {"distill.teacher": "gone.pkl"}, "gone.pkl: no such checkpoint"),
    ([], {"distill.teacher": "adapter.pkl"}, "holds an adapter, not a whole model: name its base"),
    ([], {"distill.teacher": "narrow.pkl"}, "is more than the 16 positions of the teacher: lower it"),
    ([], {"distill.top_k": 1000}, "distill.top_k=1000 is more than the "),
    ([], {"distill.hidden": "mse", "distill.layers": "[0, 2]"}, "must name a layer of the teacher, 0 to 1"),
    ([], {"distill.hidden": "mse", "distill.layers": "[1]"}, "for each of the 2 of the student"),
    ([], {"distill.hidden": "mse", "model.num_hidden_layers": 3}, "fewer than the 3"),
    ([], {"distill.attention": "maps"}, "the student has 3, the teacher 4"),
    ([], {"distill.attention": "relations", "distill.relation_heads": 5}, "must divide the widths of"),
    ([], {"distill.attention": "relations", "distill.teacher": "latent.pkl"}, "attention_kind=gqa in both"),
    ([], {"distill.hidden": "mse", "train.compile": "true"}, "and train.compile=true hides them"),
    ([], {"distill.ce_weight": 0, "distill.logits": "none"}, "distill.ce_weight=0 needs distill.logits"),
    ([], {"distill.logits": "both"}, "must be one of none, forward, reverse, jsd"),
    ([], {"model.vocab_size": 5}, "model.vocab_size=5 is less than the "),
    ([], {"data.val_fraction": 0.5}, "val_fraction=0.5 is more than the 0.3"),
    (["--init", "letters.pkl"], {}, "or start from a model with the teacher's tokenizer"),
    (["--init", "letters.pkl", "--config", "skills", "--data", "skills:expressions"],
     {"distill.answers": "teacher"}, "or start from a model with the teacher's tokenizer"),
    (["--config", "skills"], {"distill.on_policy": 0.5, "distill.teacher": "narrow.pkl",
                              "data.sequence_length": 12}, "behind it are more than the 16 positions of the"),
    (["--config", "skills"], {"distill.on_policy": 1, "model.mtp": "parallel", "distill.max_new_tokens": 8},
     "distill.on_policy=1 leaves model.mtp=parallel nothing to learn"),
    (["--data", "skills"], {}, "--data skills: dialogues; set distill.task=dialogues too"),
    (["--config", "skills"], {}, "text.txt: plain text is for train/pre_train.py"),
], ids=str)  # fmt: skip
def test_bad_input(call, home, tmp_path, words, settings, message):
    """One line each, exit code 2, and nothing written."""
    here = lambda word: str(home / word) if str(word).endswith(".pkl") else word  # noqa: E731
    words, settings = [*map(here, words)], {key: here(value) for key, value in settings.items()}
    code, _, error = call("--out", tmp_path / "new", *words, **settings)
    assert code == 2, error
    (line,) = [line for line in error.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ") and message in line, line
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").glob("*.pkl"))


def test_without_a_teacher_or_over_another_run(call, home, tmp_path, monkeypatch):
    monkeypatch.setattr("train.engine.command.ROOT", tmp_path)
    error = call("--out", tmp_path / "new")[2]
    assert "no TinySeek_Pre_final.pkl in" in error and "name one with --set distill.teacher=FILE" in error
    error = call("--out", tmp_path / "new", "--config", "skills", data="chat.jsonl")[2]
    assert "no TinySeek_SFT_final.pkl in" in error
    save_checkpoint(tmp_path / "old" / FINAL, {"short": "Distill"})
    teacher = {"distill.teacher": home / "out" / "TinySeek_Pre_final.pkl"}
    assert "is a finished run of distill_train" in call("--out", tmp_path / "old", **teacher)[2]


def test_other_tokens_are_refused_for_the_kinds_that_compare_them():
    """And for no other: what is learned from text alone may be read as other tokens."""
    one, other = (CharTokenizer(letters) for letters in ("abc", "abd"))
    check_same_tokens([], one, other)
    check_same_tokens(["logits", "hidden"], one, CharTokenizer("abc"))
    with pytest.raises(UserError, match="probabilities are of different tokens: set distill.logits=none,"):
        check_same_tokens(["logits"], one, other)
    with pytest.raises(UserError, match="line up: set distill.hidden=none and distill.attention=none, or"):
        check_same_tokens(["hidden", "attention"], one, other)


@pytest.mark.parametrize("name", preset_names("distill_train"))
def test_a_preset_is_built_and_stepped(name, call, tmp_path):
    """With a small batch; the run says itself that every weight moved."""
    data = "text.txt" if name == "default" else "chat.jsonl"
    code, _, error = call("--config", name, "--out", tmp_path, data=data, steps=3)
    assert code == 0, error
    saved, preset = load_checkpoint(tmp_path / FINAL), to_dict(load_config(name, stage="distill_train"))
    assert saved["config"]["distill"] == preset["distill"] and saved["step"] == 3
    assert {**saved["config"]["model"], "vocab_size": 0} == preset["model"]
    assert saved["config"]["optim"] == preset["optim"] | {"warmup_steps": 0}
