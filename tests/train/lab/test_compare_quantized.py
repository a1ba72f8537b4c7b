"""The table of methods on a tiny model: its loss against an obvious loop, its rows, its picture."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from inference.generation.load import load_full
from load_data.packing import prepare_pretraining
from tests.inference.quantization.tools import FORMATS, write_quantized, write_source
from train.lab import compare_quantized
from train.lab.compare_quantized import bits_per_byte
from utils.errors import run_main


@torch.no_grad()
def test_bits_per_byte_are_those_of_all_held_out_text(tmp_path):
    """Windows of 48 one after the other; each token but the first is predicted once; a token is a byte."""
    loaded = load_full(write_source(tmp_path))
    val = torch.from_numpy(prepare_pretraining(loaded.config, loaded.tokenizer).val.astype("int64"))
    nats, end = 0.0, len(val) - 1
    for first in range(0, end, 48):
        last = min(first + 48, end)
        logits = loaded.model(val[None, first:last]).logits[0].double()
        nats += F.cross_entropy(logits, val[first + 1 : last + 1], reduction="sum").item()
    assert bits_per_byte(loaded) == pytest.approx(nats / math.log(2) / end, rel=1e-5)


def test_the_command(tmp_path, monkeypatch, capsys):
    """A row for fp32 and for each method; fewer bits, less memory, another loss."""
    source, png = write_source(tmp_path), tmp_path / "a.png"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--checkpoint", source, "--methods", "rtn8,nf4", "--rows", 2, "--png", png]
    monkeypatch.setattr(sys, "argv", ["compare_quantized.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_main(compare_quantized.main)
    assert ended.value.code == 0 and png.stat().st_size > 1000
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["fp32", "rtn8", "nf4"]
    for column in (1, 2, 3):
        numbers = [float(row[column]) for row in rows]
        assert numbers == sorted(numbers, reverse=True)
    for row in rows:
        assert float(row[4]) - float(rows[0][4]) == pytest.approx(float(row[5]), abs=2e-4)  # as printed


def test_bad_calls_are_one_line(tmp_path, monkeypatch, capsys):
    small = write_quantized(tmp_path / "small.pkl", write_source(tmp_path), FORMATS["rtn8"])
    cases = {
        ("--methods", "rtn3"): "--methods rtn3: known are rtn8",
        ("--rows", "0"): "--rows must be at least 1",
        ("--checkpoint", str(small)): "small.pkl is quantised already (rtn)",
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for arguments, words in cases.items():
        monkeypatch.setattr(sys, "argv", ["compare_quantized.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_main(compare_quantized.main)
        assert ended.value.code == 2 and words in capsys.readouterr().err
