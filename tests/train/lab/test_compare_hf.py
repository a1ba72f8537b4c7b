"""The comparison with transformers: our cost card and its figures agree, and so do the numbers computed."""

import json
import sys

import pytest

from tests.inference.hf.models import make_model, save
from train.lab import compare_hf
from utils.errors import UserError


def table(monkeypatch, capsys, *args) -> dict[str, list[str]]:
    """The rows that the command prints, by name."""
    monkeypatch.setattr(sys, "argv", ["compare_hf.py", *map(str, args)])
    monkeypatch.setattr(compare_hf, "TURNS", 1)
    compare_hf.main()
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    return {line[0]: [part.strip() for part in line[1:] if part.strip()] for line in lines}


@pytest.mark.parametrize("case", ["Qwen3, tied, bias", "Qwen2Moe, dense first layer, normalised",
                                  "DeepseekV3, groups"])  # fmt: skip
def test_both_sides_agree(case, tmp_path, monkeypatch, capsys):
    """On the weights of a folder, and on random ones if it has none."""
    save(case, tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(settings))
    for folder in ("whole", "bare"):
        rows = table(monkeypatch, capsys, tmp_path / folder, "--tokens", "24")
        assert rows["parameters"][0] == f"{sum(part.numel() for part in make_model(case).parameters()):,}"
        for name in ("parameters", "weights in fp32", "forward pass, per token", "cache of the prompt"):
            ours, theirs = rows[name]
            assert ours == theirs, name
        assert float(rows["largest difference of logits"][0]) < 1e-5
        assert rows["the same 16 greedy tokens"] == ["yes"]
        assert len(rows["each further token"]) == 2


def test_a_prompt_must_fit(tmp_path, monkeypatch, capsys):
    save("Qwen3, tied, bias", tmp_path)
    with pytest.raises(UserError, match="1 to 112"):
        table(monkeypatch, capsys, tmp_path, "--tokens", "113")
