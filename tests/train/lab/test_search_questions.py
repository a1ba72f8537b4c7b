"""Twenty questions: their answers exist, and ranks count what a newcomer would see."""

import sys
from types import SimpleNamespace

import pytest
import torch

from inference.index.passages import Passage
from inference.index.store import Index
from tests.inference.index.tools import tiny_checkpoint
from tests.train.tools import ROOT
from train.lab import search_questions
from utils.errors import run_main


def test_the_answers_are_files_that_are_searched():
    assert len(search_questions.QUESTIONS) == 20
    for files in search_questions.QUESTIONS.values():
        assert all(name.startswith(search_questions.FOLDERS) and (ROOT / name).is_file() for name in files)


def test_places_and_table(monkeypatch):
    """The questions themselves, and what is outside the folders, do not count."""
    answers = {"q": ("utils/a.py", "utils/b.py"), "r": ("utils/c.py",)}
    monkeypatch.setattr(search_questions, "QUESTIONS", answers)
    files = ["train/lab/search_questions.py", "tests/utils/a.py", "utils/c.py", "utils/b.py", "utils/a.py"]
    passages = [Passage(file, line, line, file, "") for line, file in enumerate(files, 5)]
    index = Index("key", {}, passages, torch.tensor([[5.0], [4], [3], [2], [1]]))
    reader = SimpleNamespace(query=lambda text: torch.ones(1))
    columns = [[search_questions.place_of(question, index, reader) for question in "qr"]]
    assert columns == [[(2, "utils/b.py:8"), (1, "utils/c.py:7")]]
    columns.append([(11, "utils/a.py:1"), (10, "utils/c.py:1")])
    assert search_questions.table(["one", "two"], columns) == [
        "| question | one | two | found |", "| --- | --- | --- | --- |",
        "| q | 2 | 11 | utils/b.py:8 |", "| r | 1 | 10 | utils/c.py:7 |",
        "| mean reciprocal rank | 0.75 | 0.10 |  |", "| among the first ten | 2 | 1 |  |",
    ]  # fmt: skip


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(search_questions, "QUESTIONS", {"q": ("utils/a.py",)})
    monkeypatch.setattr(search_questions, "REPOSITORY", tmp_path)
    model = tiny_checkpoint(tmp_path / "out" / "tiny.pkl")
    monkeypatch.setattr(sys, "argv", ["", "--models", str(model), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run_main(search_questions.main)
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and lines[0] == "| question | tiny | found |"
    assert lines[2:] == ["| q | 1 | utils/a.py:1 |", "| mean reciprocal rank | 1.00 |  |",
                         "| among the first ten | 1 |  |"]  # fmt: skip
