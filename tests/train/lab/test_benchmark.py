"""The benchmark command on shapes so small that only its words and its arithmetic can be checked."""

import itertools
import multiprocessing
import re
import sys

import pytest
import torch

from config.load import load_config
from model.tinyseek import TinySeek
from tests.inference.tools import byte_tokenizer, run_config, tiny_model
from tests.train.tools import machine
from train.lab import benchmark
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

SMALL = {
    "model.vocab_size": 64, "model.hidden_size": 32, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.intermediate_size": 48,
    "data.sequence_length": 16, "train.batch_size": 2, "train.dtype": "fp32", "train.device": "cpu",
}  # fmt: skip
EXPERTS = {"model.n_routed_experts": 4, "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 8}
MLA = EXPERTS | {"model.attention_kind": "mla"}


def slow(*values):
    """A case that waits for a second process."""
    return pytest.param(*values, marks=pytest.mark.slow)


def words_of(capsys, monkeypatch, *arguments, **settings):
    """What the command prints."""
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, *sets])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "changes", "names"),
    [
        slow("benchmark_moe", EXPERTS, {"TinySeek, dense, as wide", "TinySeek (auto)", "TinySeek (sdpa)",
                                        "Qwen3MoeForCausalLM (sdpa)"}),
        slow("laptop", EXPERTS, {"TinySeek, dense, as wide", "Dots1ForCausalLM (eager)"}),
        ("laptop", MLA, {"TinySeek, dense, as wide", "TinySeek (auto)"}),
    ],
)
def test_training_names_every_contender_with_a_ratio(capsys, monkeypatch, preset, changes, names):
    flags = ("--config", preset, "--only", "train", "--steps", "3")
    words = words_of(capsys, monkeypatch, *flags, **SMALL | changes)
    row = r"^  (\S.*?) +[\d,]+ tokens/s  \([\d,]+ to [\d,]+\)  ratio ([\d.]+)"
    rows = re.findall(row, words, re.MULTILINE)
    assert names <= {name for name, _ in rows} and float(rows[-1][1]) == 1.0
    assert ("against dense of the same active width: " in words) == (benchmark.DENSE in names)


def test_decoding_names_every_contender(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "NEW_TOKENS", 4)
    monkeypatch.setattr(benchmark, "PROMPT", 4)
    words = words_of(capsys, monkeypatch, "--config", "benchmark_moe", "--only", "decode", "--steps", "2",
                     **SMALL | EXPERTS)  # fmt: skip
    for name in ("TinySeek ", "TinySeek, plain path", "Qwen3MoeForCausalLM.generate"):
        assert f"  {name}" in words


def test_medians_and_ratios_are_those_of_the_times(capsys):
    """By hand: medians 2 and 4 seconds for 100 tokens, so 50 and 25 a second; ratio 2 in most turns."""
    benchmark.report({"ours": [1.0, 4.0, 2.0], "theirs": [2.0, 8.0, 4.0]}, 100, "tokens/s")
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"ours +50 tokens/s .* ratio 2.00", first)
    assert re.search(r"theirs +25 tokens/s .* ratio 1.00", second)
    assert benchmark.ratio([1.0, 1.0, 10.0], [3.0, 2.0, 10.0]) == 2.0  # that of the medians would be 3


def test_one_turn_is_enough(capsys, monkeypatch):
    benchmark.report({"ours": [2.0], "theirs": [4.0]}, 100, "tokens/s")
    assert re.search(r"ours +50 tokens/s  \(50 to 50\)  ratio 2.00", capsys.readouterr().out)
    with pytest.raises(UserError, match="at least 1"):
        words_of(capsys, monkeypatch, "--steps", "0")


def test_contenders_take_turns():
    """Everyone once a turn, after everyone else in some turn, and the first three turns are not counted."""
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = benchmark.take_turns(contenders, 17, machine())
    assert {name: len(times) for name, times in seconds.items()} == {"a": 17, "b": 17, "c": 17}
    turns = [calls[first : first + 3] for first in range(0, 60, 3)]
    assert len(calls) == 60 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert {tuple(turn[:2]) for turn in turns} == set(itertools.permutations("abc", 2))


@pytest.mark.slow
def test_twins_train_in_a_process_of_their_own():
    """It ends with the comparison; if it ends before, that is said, and nobody waits."""
    config = load_config("benchmark", [f"{key}={value}" for key, value in SMALL.items()])
    with benchmark.twins_steps(config, machine()) as steps:
        (child,) = multiprocessing.active_children()
        assert list(steps) == ["Qwen3ForCausalLM (eager)", "Qwen3ForCausalLM (sdpa)"]
        assert [step() for step in steps.values()] == [None, None]
        child.kill()
        child.join()
        with pytest.raises(UserError, match="process of the Hugging Face twins ended"):
            steps["Qwen3ForCausalLM (sdpa)"]()
    assert not multiprocessing.active_children()
    with pytest.raises(ZeroDivisionError), benchmark.twins_steps(config, machine()):
        assert multiprocessing.active_children()
        _ = 1 / 0
    assert not multiprocessing.active_children()


def test_a_training_step_of_any_contender_learns():
    config = load_config("benchmark_moe", [f"{key}={value}" for key, value in (SMALL | EXPERTS).items()])
    losses = []

    def watched(loss):
        return lambda *batch: losses.append(loss(*batch)) or losses[-1]

    contenders = {
        TinySeek(config.model): lambda model, ids, labels: model(ids, labels).loss_sum / labels.numel(),
        benchmark.hugging_face_twin(config, "eager"): lambda model, ids, labels: model(ids, labels=ids).loss,
    }
    for model, loss in contenders.items():
        losses.clear()
        step = benchmark.training_step(model, config, machine(), watched(loss))
        for _ in range(5):
            step()
        assert losses[-1] < losses[0]


def test_the_twin_is_as_large_as_ours():
    """A peer of another size would be no peer: parameters equal, one by one."""
    for preset, changes in (("benchmark", {}), ("benchmark_moe", EXPERTS), ("laptop", EXPERTS)):
        config = load_config(preset, [f"{key}={value}" for key, value in (SMALL | changes).items()])
        ours = dict(TinySeek(config.model).named_parameters())
        theirs = dict(benchmark.hugging_face_twin(config, "eager").named_parameters())
        assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_drafts_are_compared_with_plain_decoding(capsys, monkeypatch, tmp_path, kind):
    """With a random model: the same output for every prompt, whatever is accepted."""
    model = tiny_model(mtp=kind, **{key.partition(".")[2]: value for key, value in EXPERTS.items()})
    config = run_config(model)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40, encoding="utf-8")
    config["data"] |= {"paths": [str(text)], "cache_dir": str(tmp_path / "cache"), "sequence_length": 16}
    path = tmp_path / "model.pkl"
    parts = {"weights": model.state_dict(), "tokenizer": byte_tokenizer().to_json()}
    save_checkpoint(path, {"stage": "pre_train", "short": "Pre", "config": config, "step": 1, **parts})
    monkeypatch.setattr(benchmark, "PASSAGES", 3)
    words = words_of(capsys, monkeypatch, "--drafts", str(path))
    assert words.count("3 prompts of 16 tokens, greedy") == 1
    shown = re.findall(r"(\d) drafted .* accepted [\d.]+%  same output 3 of 3", words)
    assert shown == (["1", "2", "3"] if kind == "sequential" else ["1"])
