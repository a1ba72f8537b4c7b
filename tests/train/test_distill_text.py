"""train/distill_train.py on the text of a teacher, on samples of the student, and on stored logits, from the
command line; exact resume; and what is refused."""

import json

import pytest
import torch

from load_data.tokenization.tokenizer import BpeTokenizer
from model.tinyseek import TinySeek
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.modules.tools import shake, small_config
from tests.train.engine.test_fine_tuning import call, call_until
from tests.train.students import MOE, make_stage, make_student, make_teacher, steps_of, student_config
from tests.train.tools import same_bits, without_timing
from train import distill_train
from train.engine import teacher_answers
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.log import read_log

SETTINGS = ("data.sequence_length=48", "train.batch_size=4", "train.dtype=fp32", "data.val_fraction=0.3",
            "optim.optimizer=adamw", "optim.lr=0.003", "optim.warmup_steps=0", "train.log_every=1",
            "model.max_position_embeddings=64", "distill.max_new_tokens=8", "distill.questions=12")
OWN = ("distill.on_policy=0.5", "distill.logits=jsd", "distill.top_k=5", "distill.store_logits=true")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Dialogues, a teacher that often ends soon, and a student with other tokens."""
    folder = tmp_path_factory.mktemp("distill")
    with (folder / "dialogues.jsonl").open("w", encoding="utf-8") as file:
        for number in range(30):
            turns = [("user", f"say {number}"), ("assistant", f"{number}!")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    model, other = tiny_model(seed=5), shake(TinySeek(small_config(vocab_size=300)), seed=6)
    model.lm_head.weight.data[BpeTokenizer([]).special_ids["<|im_end|>"]] *= 2
    weights = {"weights": model.state_dict(), "config": run_config(model)}
    write_checkpoint(folder / "teacher.pkl", "SFT", **weights)
    others = {"weights": other.state_dict(), "config": run_config(other)}
    tokenizer = BpeTokenizer([("s", "a"), ("sa", "y")]).to_json()
    write_checkpoint(folder / "other.pkl", "Pre", tokenizer=tokenizer, **others)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few scores: they would take longer than training."""
    monkeypatch.setattr("train.engine.fine_tuning.SCORED_DIALOGUES", 1)
    monkeypatch.setattr("train.engine.fine_tuning.SCORED", 1)
    monkeypatch.setattr("train.engine.fine_tuning.SFT_SKILLS", ())
    monkeypatch.setattr(teacher_answers, "VAL_PER_SKILL", 3)


def flags(files, out, *settings, data=None, steps=8):
    """Flags of a short run."""
    found = ["--config", "skills", "--data", data or files / "dialogues.jsonl", "--out", out]
    found += ["--device", "cpu", "--max-steps", steps]
    cache = (f"data.cache_dir={files / 'cache'}", f"distill.teacher={files / 'teacher.pkl'}")
    for setting in (*SETTINGS, *cache, *settings):
        found += ["--set", setting]
    return [str(flag) for flag in found]


def test_own_samples_and_stored_logits_resume_exactly(files, tmp_path, monkeypatch):
    """The log tells which steps were on own samples; a resumed run reads the logits in the cache."""
    words = {name: flags(files, tmp_path / name, *OWN, "train.save_every=3") for name in "ab"}
    call(monkeypatch, distill_train, words["a"])
    call_until(monkeypatch, distill_train, words["b"], 6)
    with monkeypatch.context() as patch:
        patch.setattr("train.engine.teacher_logits.write_folder", None)
        call(patch, distill_train, [*words["b"], "--resume"])
    one, two = (load_checkpoint(tmp_path / name / "TinySeek_Distill_final.pkl") for name in "ab")
    assert same_bits(one.pop("weights"), two.pop("weights"))
    logs = [read_log(tmp_path / name / "distill_train" / "log.txt") for name in "ab"]
    assert without_timing(logs[0]) == without_timing(logs[1])
    own = [row["own"] for row in logs[0] if "own" in row]
    assert len(own) == 8 and set(own) == {0, 1}
    assert all("logits" in row for row in logs[0] if "own" in row)
    assert len(list((files / "cache").glob("teacher_logits_*"))) == 1


def test_a_student_with_other_tokens_learns_the_text_of_its_teacher(files, tmp_path, monkeypatch, capsys):
    """It answers as the teacher did, spelled by its own tokenizer; probabilities cannot be compared."""
    words = ("--init", files / "other.pkl", "--set", "distill.answers=teacher")
    given = [*flags(files, tmp_path, data="skills:expressions"), *words]
    call(monkeypatch, distill_train, [*given, "--set", "distill.logits=none"])
    said = capsys.readouterr().out
    assert "expressions: 12 questions; teacher: " in said and "weights proven" in said
    saved = load_checkpoint(tmp_path / "TinySeek_Distill_final.pkl")
    assert saved["tokenizer"] == load_checkpoint(files / "other.pkl")["tokenizer"]
    with pytest.raises(UserError, match="distill.logits: the student of --init and the teacher have differ"):
        call(monkeypatch, distill_train, [*given, "--overwrite"])


@pytest.mark.parametrize("mtp", ["none", "parallel"])
def test_own_samples_are_no_truth(mtp):
    """A batch with the mark gives the gradient of a loss without cross-entropy, another one does not."""
    found = {}
    for weight in (0, 1):
        config = student_config(*MOE, f"distill.ce_weight={weight}", f"model.mtp={mtp}")
        stage, batches = make_stage(config, make_teacher(), make_student(config)), steps_of()[0][:1]
        for mark in ({}, {"own": torch.ones((), dtype=torch.bool)}):
            batch = batches[0] | mark
            stage.loss.before_step(stage.model, [batch])
            terms, measures = stage.loss(stage.model, batch, 7.0)
            parameters = list(stage.model.parameters())
            grads = torch.autograd.grad(sum(terms.values()), parameters, allow_unused=True)
            found[weight, bool(mark)] = terms, [one for one in grads if one is not None]
            assert "ce" in measures
    for marked in (False, True):
        terms, (none, one) = found[1, marked][0], (found[weight, marked][1] for weight in (0, 1))
        assert ("ce" in terms) != marked and ("mtp" in terms) == (mtp != "none" and not marked)
        same = len(none) == len(one) and all(map(torch.equal, none, one))
        assert same == marked


@pytest.mark.parametrize(("setting", "error"), [
    (["task=text", "on_policy=1"], "distill.on_policy is for dialogues: set distill.task=dialogues"),
    (["task=text", "answers=teacher"], "distill.answers is for dialogues"),
    (["task=text", "store_logits=true", "top_k=2"], "distill.store_logits is for dialogues"),
    (["on_policy=1", "logits=none"], "set distill.logits to a divergence, and distill.answer_temperature"),
    (["on_policy=1", "answer_temperature=0"], "and distill.answer_temperature above 0"),
    (["store_logits=true"], "keeps the teacher's best tokens: set distill.top_k"),
    (["answers=teacher"], "distill.answers=teacher asks questions of skills; name skills:arithmetic"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_one_line(setting, error, files, tmp_path, monkeypatch):
    words = [f"distill.{one}" for one in setting]
    with pytest.raises(UserError, match=error):
        call(monkeypatch, distill_train, flags(files, tmp_path, *words))
