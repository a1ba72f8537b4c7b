"""The benchmark command on shapes so small that only its words and its arithmetic can be checked."""

import re
import sys

import pytest
import torch

from config.load import load_config
from model.tinyseek import TinySeek
from tests.inference.tools import byte_tokenizer, run_config, tiny_model
from tests.train.tools import machine
from train import benchmark
from utils.checkpoint import save_checkpoint

SMALL = {
    "model.vocab_size": 64, "model.hidden_size": 32, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.intermediate_size": 48,
    "data.sequence_length": 16, "train.batch_size": 2, "train.dtype": "fp32", "train.device": "cpu",
}  # fmt: skip
EXPERTS = {"model.n_routed_experts": 4, "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 8}
MLA = EXPERTS | {"model.attention_kind": "mla"}


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
        ("benchmark", {}, {"TinySeek (auto)", "TinySeek (sdpa)", "Qwen3ForCausalLM (sdpa)"}),
        ("benchmark_moe", EXPERTS, {"TinySeek, dense, as wide", "Qwen3MoeForCausalLM (sdpa)"}),
        ("laptop", EXPERTS, {"TinySeek, dense, as wide", "Dots1ForCausalLM (eager)"}),
        ("laptop", MLA, {"TinySeek, dense, as wide", "TinySeek (auto)"}),
    ],
)
def test_training_names_every_contender_with_a_ratio(capsys, monkeypatch, preset, changes, names):
    flags = ("--config", preset, "--only", "train", "--steps", "3")
    words = words_of(capsys, monkeypatch, *flags, **SMALL | changes)
    row = r"^  (\S.*?) +[\d,]+ tokens/s  \([\d,]+ to [\d,]+\)  ratio ([\d.]+)"
    rows = re.findall(row, words, re.MULTILINE)
    assert names <= {name for name, _ in rows} and float(rows[-1][1]) == 1.0


def test_decoding_names_every_contender(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "NEW_TOKENS", 4)
    monkeypatch.setattr(benchmark, "PROMPT", 4)
    words = words_of(capsys, monkeypatch, "--config", "benchmark_moe", "--only", "decode", "--steps", "2",
                     **SMALL | EXPERTS)  # fmt: skip
    for name in ("TinySeek ", "TinySeek, plain path", "Qwen3MoeForCausalLM.generate"):
        assert f"  {name}" in words


def test_medians_and_ratios_are_those_of_the_times(capsys):
    """Times by hand: medians 2 and 4 seconds for 100 tokens, so 50 and 25 a second, ratio 2."""
    benchmark.report({"ours": [1.0, 2.0, 9.0], "theirs": [4.0, 4.0, 4.0]}, 100, "tokens/s")
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"ours +50 tokens/s .* ratio 2.00", first)
    assert re.search(r"theirs +25 tokens/s .* ratio 1.00", second)


def test_contenders_take_turns():
    """Call by call, and the first three of each are not counted."""
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = benchmark.take_turns(contenders, 2, machine())
    assert calls == ["a", "b"] * 5 and [len(times) for times in seconds.values()] == [2, 2]


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
    words = words_of(capsys, monkeypatch, "--drafts", str(path), "--prompts", "3")
    assert words.count("3 prompts of 16 tokens, greedy") == 2
    shown = re.findall(r"(\d) drafted .* accepted [\d.]+%  same output 3 of 3", words)
    assert shown == (["1", "2", "3"] * 2 if kind == "sequential" else ["1", "1"])
