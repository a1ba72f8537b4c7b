"""Bad calls of the comparison of caches end in one line."""

import sys

import pytest

from train.lab import compare_caches
from utils.errors import run_main


def test_no_texts_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_caches.py", "--count", "0"])
    with pytest.raises(SystemExit) as ended:
        run_main(compare_caches.main)
    assert ended.value.code == 2 and "--count 0 must be at least 1" in capsys.readouterr().err
