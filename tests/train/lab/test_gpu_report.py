"""The report on a CPU, in its small mode: its files, its arithmetic, and that it notices what fails."""

import json
import sys

import pytest
import torch

from config.load import load_config
from model.tinyseek import TinySeek
from train.lab import gpu_report
from utils.cost import cost_card
from utils.errors import UserError

TESTS = """
import os, pytest

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_works(device):
    assert device == "cpu"

@pytest.mark.parametrize("device", ["cpu"])
def test_fails(device):
    assert not os.environ.get("BROKEN")
"""


def report(monkeypatch, out, *flags):
    """Run the command with one model and the checks above; return its exit code and both files."""
    checks = out.parent / "test_checks.py"
    checks.write_text(TESTS, encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_report, "CHECKS", checks)
    monkeypatch.setattr(gpu_report, "MODELS", {"gpu_small": gpu_report.MODELS["gpu_small"]})
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(out), *flags])
    code = gpu_report.main()
    about, table = (out / f"gpu_report.{end}" for end in ("json", "md"))
    return code, json.loads(about.read_text("utf-8")), table.read_text("utf-8")


@pytest.mark.slow
def test_the_small_mode(tmp_path, monkeypatch, capsys):
    code, about, table = report(monkeypatch, tmp_path / "out")
    assert code == 0 and "FAILED: nothing" in capsys.readouterr().out
    assert about["checks"] == {"passed": ["works[cpu]", "fails[cpu]"], "failed": [], "problem": ""}
    plain, compiled = about["models"]
    assert plain["tokens/s"] > 0 and not plain["failed"] and set(plain) < {*gpu_report.COLUMNS, "failed"}
    assert compiled["note"] == "not in the small mode"
    head, _, first, second, _, last = table.splitlines()
    assert head.count("|") == first.count("|") == second.count("|") == len(gpu_report.COLUMNS) + 1
    assert first.startswith(f"| gpu_small | no | {plain['parameters']:,} | ")
    assert "Checks: 2 passed, 0 failed." in last


def test_failures_are_named_and_there_is_a_limit_of_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BROKEN", "1")
    code, about, table = report(monkeypatch, tmp_path, "--minutes", "0.3")
    assert code == 1 and "FAILED: checks" in capsys.readouterr().out
    assert about["checks"]["failed"] == ["fails[cpu]"]
    assert about["models"][0]["note"] == "no time was left" and "1 failed; fails[cpu]; exit code 1" in table


def test_a_model_that_crashes_has_failed_and_one_that_is_too_large_has_not(tmp_path, monkeypatch):
    ends = {"checks": ("", ""), "a": ("", "exit code 1: it broke"), "b": ("", "exit code 2: out of memory")}
    monkeypatch.setattr(gpu_report, "run", lambda words, seconds: ends.get(words[-1], ends["checks"]))
    for model, code in (("a", 1), ("b", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(gpu_report, "MODELS", {model: None})
            patch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path)])
            patch.setattr(torch.cuda, "is_available", lambda: False)
            assert gpu_report.main() == code


@pytest.mark.slow
@pytest.mark.parametrize(("code", "seconds", "expected"), [
    ("print('fine')", 60, ["fine", ""]),
    ("import sys; print(1); sys.exit('a\\nreason\\n')", 60, ["1", "exit code 1: reason"]),
    ("import time; time.sleep(60)", 1, ["", "not done within 1 s"]),
])  # fmt: skip
def test_a_process_that_works_breaks_or_hangs(code, seconds, expected):
    assert [words.strip() for words in gpu_report.run(["-c", code], seconds)] == expected


@pytest.mark.parametrize("name", ["gpu_base", "350 M active, experts"])
def test_figures_follow_from_the_time_of_a_step(monkeypatch, name):
    """With a clock by which every step takes two seconds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_report, "peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(gpu_report.time, "perf_counter", iter(range(0, 1000, 2)).__next__)
    threads = torch.get_num_threads()
    row = gpu_report.measure(name, compiled=False)
    torch.set_num_threads(threads)
    preset, changes = gpu_report.MODELS[name]
    config = load_config(preset, [*changes, *gpu_report.SMALL])
    card = cost_card(TinySeek(config.model), 32, 16, "muon")
    speed = 2 * 16 * 4 / 2  # rows, tokens, micro-batches, seconds
    assert (row["ms per step"], row["tokens/s"]) == (2000, speed)
    assert row["MFU %"] == pytest.approx(speed * card.train_flops() / 1e9 * 100)
    assert (row["parameters"], row["active"]) == (card.parameters, card.active_parameters)


def test_the_large_models_are_as_large_as_their_names():
    for name in ("350 M", "350 M active, experts"):
        config = load_config("gpu_base", gpu_report.MODELS[name][1])
        config.model.vocab_size = config.tokenizer.vocab_size
        with torch.device("meta"):
            card = cost_card(TinySeek(config.model), 1)
        assert 340e6 < card.active_parameters < 360e6
        assert (card.parameters > 900e6) == ("experts" in name)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path / "file")])
    with pytest.raises(UserError, match="cannot write there"):
        gpu_report.main()
