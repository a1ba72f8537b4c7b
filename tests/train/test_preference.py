"""train/dpo_train.py and train/reward_train.py from the command line: what they train, save and refuse, pairs
that a model makes itself, exact resume, and that two processes equal one."""

import json
import os

import pytest
import torch

from inference.generation import load
from inference.generation.generator import Answer
from inference.generation.reward import load_reward
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.records import message
from load_data.skills import Item
from load_data.tokenization.tokenizer import CharTokenizer
from tests.inference.tools import byte_tokenizer, run_config, tiny_model, write_checkpoint
from tests.processes import fork, without_pictures
from tests.train.engine.test_fine_tuning import MOE, call, call_until
from tests.train.tools import largest_difference, machine, same_bits, without_timing
from train import dpo_train, reward_train
from train.engine import fine_tuning, sampled_pairs
from train.engine.answer_rows import Row, judge_of
from train.engine.command import parse_command
from train.engine.fine_tuning import open_base
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.log import read_log

SETTINGS = ("data.sequence_length=48", "train.batch_size=4", "train.dtype=fp32", "data.val_fraction=0.3",
            "optim.optimizer=adamw", "optim.lr=0.003", "optim.warmup_steps=0", "train.log_every=1",
            "pairs.prompts=24", "pairs.samples=12", "pairs.max_new_tokens=24")  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs of which the chosen answers repeat the number, and a base with experts and a second head."""
    folder = tmp_path_factory.mktemp("pairs")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(40):
            record = {"prompt": f"say {number}", "chosen": f"{number}!", "rejected": f"no {number * 7}"}
            file.write(json.dumps(record) + "\n")
    model = tiny_model(seed=5, mtp="parallel", **MOE)
    write_checkpoint(folder / "base.pkl", "SFT", weights=model.state_dict(), config=run_config(model))
    return folder


def flags(files, out, *settings, data=None, steps=9):
    """Flags of a short run."""
    found = ["--data", data or files / "pairs.jsonl", "--init", files / "base.pkl", "--out", out]
    found += ["--device", "cpu", "--max-steps", steps]
    for setting in (*SETTINGS, f"data.cache_dir={files / 'cache'}", *settings):
        found += ["--set", setting]
    return [str(flag) for flag in found]


def test_dpo_from_the_command_line(files, tmp_path, monkeypatch, capsys):
    """The policy moves, the second head and the reference do not; what is logged tells the story."""
    call(monkeypatch, dpo_train, flags(files, tmp_path, "model.dropout=0.1"))
    said = capsys.readouterr().out
    assert "model.dropout is set to 0" in said and "weights proven" in said
    assert said.splitlines()[-1].startswith(f"next: python inference/chat.py --out {tmp_path}")
    saved = load_checkpoint(tmp_path / "TinySeek_DPO_final.pkl")
    before = load_checkpoint(files / "base.pkl")["weights"]
    same = {name for name, part in saved["weights"].items() if torch.equal(part, before[name])}
    assert saved["weights"].keys() == before.keys() and saved["base"] is None
    heads = {name for name in before if name.startswith("mtp.") and "lm_head" not in name}
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert heads and heads | biases == same
    log = read_log(tmp_path / "dpo_train" / "log.txt")
    steps = [row for row in log if "loss" in row]
    assert steps[0]["dpo"] == pytest.approx(0.693147, abs=1e-6) and steps[0]["margin"] == 0
    assert steps[0]["nll"] > 0  # of the default preset
    assert {"margin", "acc", "chosen", "rejected"} <= steps[0].keys()
    values = [row for row in log if "val_acc" in row]
    assert values[0]["val_acc"] == 0 and values[-1]["val_acc"] > 0.8 and values[-1]["val_margin"] > 0
    loaded = load.load_full(tmp_path / "TinySeek_DPO_final.pkl")
    assert loaded.answers and load.find_model(tmp_path) == tmp_path / "TinySeek_DPO_final.pkl"


def test_a_reference_that_moves_stops_the_run(files, tmp_path, monkeypatch):
    from train.engine.preference_loss import PreferenceLoss

    whole = PreferenceLoss.compare

    def compare(self, model, batch):
        self.reference.model.norm.weight.data += 1e-3
        return whole(self, model, batch)

    monkeypatch.setattr(PreferenceLoss, "compare", compare)
    with pytest.raises(UserError, match="the frozen model reference was changed by training"):
        call(monkeypatch, dpo_train, flags(files, tmp_path, steps=2))


def test_a_reward_model_from_the_command_line(files, tmp_path, monkeypatch, capsys):
    """It learns the order of held-out pairs, is loaded as a reward, and refuses what does not fit it."""
    call(monkeypatch, reward_train, flags(files, tmp_path, steps=16))
    said = capsys.readouterr().out
    path = tmp_path / "TinySeek_Reward_final.pkl"
    assert f"next: python train/grpo_train.py --set rl.reward={path}" in said
    assert load_checkpoint(path)["evaluation"]["val_acc"] > 0.8
    template = ChatTemplate(byte_tokenizer())
    reward, end = load_reward(path, template), template.end_of_turn[0]
    prompts = [template.prompt([message("user", f"say {number}")]) for number in range(100, 108)]
    answers = [[[*byte_tokenizer().encode(text.format(n)), end] for n in range(100, 108)]
               for text in ("{}!", "no {}")]  # fmt: skip
    good, bad = (reward(prompts, some) for some in answers)
    rows = [Row(*pair, "", []) for pair in zip(prompts, answers[0], strict=True)]
    assert judge_of(str(path), template, "cpu")([None] * len(rows), rows) == good.tolist()
    assert (good > bad).sum() >= 7  # also on questions of three digits, which no pair had

    with pytest.raises(UserError, match=f"a reward model of reward_train, .*; use --set rl.reward={path}"):
        load.load_full(path)
    with pytest.raises(UserError, match=r"base.pkl: a full model of sft, not a reward model; use --checkpo"):
        load_reward(files / "base.pkl", template)
    with pytest.raises(UserError, match="reads the ids of another tokenizer"):
        load_reward(path, ChatTemplate(CharTokenizer("abc")))
    with pytest.raises(UserError, match="trained with data.template=tinyseek, the policy writes chatml"):
        load_reward(path, ChatTemplate(byte_tokenizer(), "chatml"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "chosen": "b"}'], 'line 1: a pair has "prompt", "chosen" and "rejected"; no rej'),
        (['{"messages": []}'], "line 1: a pair has"),
        (['{"prompt": "a", "chosen": "b", "rejected": "b"}'], "chosen and rejected are the same"),
        ([json.dumps({"prompt": "a", "chosen": "b" * 99, "rejected": "c"})], "no pair to train on"),
        (['{"prompt": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"}'],
         "message 1 has role assistant where user is expected"),
    ],
)  # fmt: skip
def test_bad_data(lines, words, files, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        call(monkeypatch, dpo_train, flags(files, tmp_path / "out", data=tmp_path / "bad.jsonl"))
    assert not list(tmp_path.rglob("*.pkl"))


# --- pairs that a model makes itself ------------------------------------------------------------------------


def test_a_right_answer_against_each_wrong_one():
    """Right ones have ended by themselves; equal answers count once; without both there is no pair."""
    template = ChatTemplate(byte_tokenizer())
    item = Item("expressions", [message("user", "What is `3 + 40`?")], "43")

    def answer(text, ended=True):
        ids = Answer(template.tokenizer.encode(text) + template.end_of_turn[:1] * ended)
        ids.finish_reason = "stop" if ended else "length"
        return ids

    given = (("7",), ("43",), ("43", False), ("43",), ("7",), ("no",), (" 43",))
    samples = [answer(*one) for one in given]
    found = sampled_pairs.contrasted(item, samples, template)
    texts = [tuple(map(template.tokenizer.decode, pair)) for pair in found]
    assert texts == [("43", "7"), (" 43", "43"), ("43", "no")]
    assert found[1][1] == samples[2] and found[0][0][-1] == template.end_of_turn[0]
    assert not sampled_pairs.contrasted(item, samples[1:2], template)
    assert not sampled_pairs.contrasted(item, samples[:1], template)


def odd_is_right(item, answer):
    """Stands in for a verifier: a random model is never right."""
    return len(answer.encode()) % 2 == 1


@pytest.mark.slow
def test_pairs_of_samples_are_repeatable_and_kept(files, tmp_path, monkeypatch):
    """The same for the same model and seed, whatever the batch; read from the cache the second time; others
    for another seed; none if the model is never right."""
    monkeypatch.setattr(sampled_pairs, "verify", odd_is_right)
    whole, calls = sampled_pairs.sampled_pairs, []
    monkeypatch.setattr(sampled_pairs, "sampled_pairs", lambda *given: calls.append(1) or whole(*given))

    def pairs(cache, *more):
        words = flags(files, tmp_path, f"data.cache_dir={tmp_path / cache}", data="skills:expressions")
        words += ["--set", "pairs.samples=30"]
        command = parse_command("dpo_train", "DPO", "", [*words, *more])
        return sampled_pairs.prepare_pairs(command.config, open_base(command, machine()), machine())

    first = pairs("a")
    assert first.summary[0].startswith("train: 24 questions of expressions, 30 answers each; ")
    assert len(calls) == 2 and pairs("a").digest == first.digest and len(calls) == 2
    monkeypatch.setattr(sampled_pairs, "QUESTIONS", 5)
    assert pairs("b").digest == first.digest and len(calls) == 4
    assert pairs("b", "--seed", "1").digest != first.digest
    monkeypatch.setattr(sampled_pairs, "verify", lambda item, answer: False)
    with pytest.raises(UserError, match="no pair to train on. A model that samples its own must be ri"):
        pairs("c")


# --- stopped, resumed, shared -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("script", "short"), [(dpo_train, "DPO"), (reward_train, "Reward")])
def test_a_run_that_was_stopped_ends_as_if_it_were_not(script, short, files, tmp_path, monkeypatch):
    words = {name: flags(files, tmp_path / name, "train.save_every=3", steps=8) for name in "ab"}
    call(monkeypatch, script, words["a"])
    call_until(monkeypatch, script, words["b"], 6)
    call(monkeypatch, script, [*words["b"], "--resume"])
    one, two = (load_checkpoint(tmp_path / name / f"TinySeek_{short}_final.pkl") for name in "ab")
    assert same_bits(one.pop("weights"), two.pop("weights")) and one == two
    logs = [read_log(tmp_path / name / script.STAGE / "log.txt") for name in "ab"]
    assert without_timing(logs[0]) == without_timing(logs[1])
    other = write_checkpoint(tmp_path / "other.pkl", "SFT", seed=9)
    if short == "DPO":
        call_until(monkeypatch, script, [*words["b"], "--overwrite"], 6)
        with pytest.raises(UserError, match="was trained with"):
            call(monkeypatch, script, [*words["b"], "--resume", "--init", str(other)])


def counting(folder, *words):
    """Run DPO on samples; each process that samples leaves a file."""
    sampled_pairs.verify, whole = odd_is_right, sampled_pairs.sampled_pairs

    def sampled(*given):
        open(f"{folder}/sampled_{os.environ.get('RANK', '0')}", "w").close()
        return whole(*given)

    sampled_pairs.sampled_pairs = sampled
    fine_tuning.SCORED, fine_tuning.SFT_SKILLS = 1, ()
    without_pictures("train.dpo_train", *words)


@pytest.mark.slow
def test_two_processes_equal_one(files, tmp_path):
    """The first process samples; the same pairs, the same weights to rounding, the same evaluation."""
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        more = [f"train.batch_size={4 // processes}", f"data.cache_dir={out / 'cache'}"]
        words = flags(files, out / "run", *more, data="skills:expressions", steps=6)
        done = fork(counting, str(out), *words, processes=processes)
        assert done.returncode == 0, done.stderr
        assert [file.name for file in out.glob("sampled_*")] == ["sampled_0"]
        results.append(load_checkpoint(out / "run" / "TinySeek_DPO_final.pkl"))
        shown = (out / "run" / "dpo_train" / "samples.txt").read_text(encoding="utf-8")
        assert shown.count("question  ") == shown.count("before ") == shown.count("after ") == 20
    one, two = results
    assert one["data_digest"] == two["data_digest"] and one["step"] == two["step"]
    assert largest_difference(one["weights"], two["weights"]) < 1e-4
    for name, value in one["evaluation"].items():
        assert two["evaluation"][name] == pytest.approx(value, rel=1e-3, abs=1e-4)
