"""The standard library as a corpus: what is in, what is out, and on which side."""

import inspect
import json
import textwrap

import pytest

from load_data.corpora.python_corpus import SourceFile, docstring_documents, read_python_corpus
from load_data.corpora.reserved import holds_reserved_sum, is_reserved, unit_hash
from utils.errors import UserError

MODULE = '''"""About this module, at some length."""
import os
os.abort()

def greet(name, *, loud: bool = False) -> str:
    """Say hello to somebody.

        Indented more.

    And less.
    """
    def inner():
        """An inner function, described."""

class Thing(dict):
    """A thing with a description."""

    async def run(self):
        """Run the thing, in its own time."""

if os.name:
    def conditional():
        """Defined under a condition."""

def short():
    """Too short."""
'''


def test_docstrings_are_documents_of_their_own():
    documents = list(docstring_documents(SourceFile("pkg/__init__.py", MODULE)))
    assert documents == [
        "module pkg\nAbout this module, at some length.\n",
        "pkg.greet(name, *, loud: bool=False)\nSay hello to somebody.\n\n    Indented more.\n\nAnd less.\n",
        "pkg.greet.inner()\nAn inner function, described.\n",
        "class pkg.Thing\nA thing with a description.\n",
        "pkg.Thing.run(self)\nRun the thing, in its own time.\n",
        "pkg.conditional()\nDefined under a condition.\n",
    ]


def test_docstrings_are_what_python_itself_shows():
    documents = list(docstring_documents(SourceFile("textwrap.py", inspect.getsource(textwrap))))
    assert f"textwrap.dedent(text)\n{inspect.getdoc(textwrap.dedent).strip()}\n" in documents
    nested = list(docstring_documents(SourceFile("json/decoder.py", inspect.getsource(json.decoder))))
    expected = inspect.getdoc(json.JSONDecoder.raw_decode).strip()
    assert f"json.decoder.JSONDecoder.raw_decode(self, s, idx=0)\n{expected}\n" in nested


def test_what_cannot_be_parsed_has_no_docstrings():
    assert list(docstring_documents(SourceFile("a.py", "def ("))) == []
    assert list(docstring_documents(SourceFile("a.py", ""))) == []


def test_tests_tables_and_packages_are_left_out(tmp_path):
    kept = ["a.py", "pkg/b.py", "testing.py", "unittest/case.py"]
    left_out = ["test/a.py", "pkg/tests/a.py", "idlelib/idle_test/a.py", "site-packages/x/a.py", "a.txt"]
    left_out += ["encodings/cp1.py", "pydoc_data/topics.py", "config-3/a.py", "_sysconfigdata_x.py"]
    for name in kept + left_out:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("# grün\n".encode("latin-1"))
    (tmp_path / "empty.py").write_text("")
    fraction = (min(map(unit_hash, kept)) + sorted(map(unit_hash, kept))[1]) / 2
    corpus = read_python_corpus(fraction, root=tmp_path)
    assert [file.name for file in corpus.files] == sorted(kept)
    assert [file.name for file in corpus.val] == [min(kept, key=unit_hash)]


def test_an_interpreter_without_sources_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no Python source files in .*--data FILE"):
        read_python_corpus(0.05, root=tmp_path)


def test_the_split_is_by_file_and_stable(library, tmp_path):
    train, val = ({file.name for file in side} for side in (library.train, library.val))
    assert train and val and not train & val
    assert all(unit_hash(name) < 0.05 for name in val) and all(unit_hash(name) >= 0.05 for name in train)
    for number in range(50):
        (tmp_path / f"{number}.py").write_text("x = 1")
    some, more = ({file.name for file in read_python_corpus(share, tmp_path).val} for share in (0.2, 0.5))
    assert some < more  # a larger share adds files, it does not shuffle them


def test_the_real_corpus_is_large_and_clean(library):
    names = {file.name for file in library.files}
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    assert not any("/test/" in f"/{name}" or "/tests/" in f"/{name}" for name in names)
    assert 5e6 < sum(len(file.text) for file in library.files) < 20e6
    assert f"{len(library.val)} held out" in library.summary and library.digest in library.summary


def test_no_reserved_sum_is_trained_on_and_copied_lines_are_counted(tmp_path):
    """Files with a reserved sum are not for training; the summary is honest about boilerplate (D19)."""
    held_out = next(f"{n}.py" for n in range(99) if unit_hash(f"{n}.py") < 0.2)
    kept, left_out = [f"{n}.py" for n in range(99) if unit_hash(f"{n}.py") >= 0.2][:2]
    copied, own = "    raise NotImplementedError('subclasses do')\n", "x = 'a line that no other file has'\n"
    assert is_reserved("2 + 3") and not is_reserved("1 + 7")
    (tmp_path / held_out).write_text(own + copied + "y = 2+3\n")
    (tmp_path / kept).write_text(copied + "y = 1+7")
    (tmp_path / left_out).write_text("y = 3+2")
    corpus = read_python_corpus(0.2, root=tmp_path)
    assert [[file.name for file in side] for side in (corpus.train, corpus.val)] == [[kept], [held_out]]
    assert corpus.repeated_share == len(copied) / len(corpus.val[0].text)
    assert f"{corpus.repeated_share:.1%} of the held-out text is lines" in corpus.summary


def test_no_file_to_train_on_holds_a_reserved_sum(library):
    assert not any(holds_reserved_sum(file.text) for file in library.train[:40])


def test_the_digest_follows_names_and_contents_only(tmp_path):
    def digest(folder, text):
        for name in ("a.py", "b.py", "c.py", "d.py"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(text if name == "a.py" else "x = 1")
        return read_python_corpus(0.5, root=tmp_path / folder).digest

    assert digest("one", "y = 1") == digest("two", "y = 1") != digest("three", "y = 2")
