"""Notes and their repetitions, read back by a parser of their own."""

import math
import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from config.schema import DataConfig
from load_data.corpora.python_corpus import PythonCorpus, SourceFile
from load_data.corpora import recall, sources
from load_data.corpora.recall import LIST_LINES, REPEATED, WORDS, note, question, recall_documents, with_notes
from load_data.corpora.sources import TRAIN, VAL, Sources

NOTE = re.compile(r"^# (\w+) (\w+)$")


def notes_of(text):
    """The notes of a text as (name, value), in order."""
    return [match.groups() for line in text.splitlines() if (match := NOTE.match(line))]


def test_a_name_has_one_value_in_a_document():
    """Else a far note would be less reliable than a near one. In other documents it has others."""
    rng, over_all = random.Random(0), {}
    for _ in range(20):
        found = set(notes_of(with_notes([""] * 600, 1, rng)))
        assert len(found) == len({name for name, _ in found})
        for name, value in found:
            over_all.setdefault(name, set()).add(value)
    assert all(len(values) > 5 for values in over_all.values())


def test_three_quarters_are_repetitions(monkeypatch):
    """With one note kept, every note but the first repeats it or is new, and 40 lines never need a name
    twice."""
    monkeypatch.setattr(recall, "REACH", 1)
    monkeypatch.setattr(recall, "NEAREST", 1)
    rng = random.Random(1)
    texts = [notes_of(with_notes([""] * 40, 1, rng)) for _ in range(200)]
    assert {len(text) for text in texts} == {40}
    assert all(one == other or one not in text[:n] for text in texts
               for n, (other, one) in enumerate(pairwise(text), start=1))  # fmt: skip
    repeated = sum(len(text) - len(set(text)) for text in texts) / (200 * 39)
    assert abs(repeated - REPEATED) < 5 * math.sqrt(REPEATED * (1 - REPEATED) / (200 * 39))


def test_the_text_between_stays_as_it_is():
    lines = [f"line {n}\n" for n in range(300)] + ["no end of line"]
    text = with_notes(lines, 3, random.Random(2))
    kept = [line for line in text.splitlines(keepends=True) if not NOTE.match(line)]
    assert kept == lines
    assert 60 < len(notes_of(text)) < 140  # a hundred on average, with a deviation of 8


def test_repetitions_reach_across_every_distance():
    """Distances in notes, by powers of two: none of the ranges from 1 to 63 is rare."""
    rng, ranges = random.Random(3), Counter()
    for _ in range(40):
        last = {}
        for place, pair in enumerate(notes_of(with_notes([""] * LIST_LINES, 1, rng))):
            if pair in last:
                ranges[int(math.log2(place - last[pair]))] += 1
            last[pair] = place
    assert min(ranges[power] for power in range(6)) > 0.03 * ranges.total(), ranges


@pytest.fixture(autouse=True)
def few_lists(monkeypatch):
    """Eight lists instead of thousands."""
    monkeypatch.setattr(recall, "LISTS", 8)


def test_documents_are_the_same_for_a_seed():
    texts = [f"a = {n}\n" * 30 for n in range(8)]
    first, again, other = (list(recall_documents(texts, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 8 + 5  # six tenths of the files, rounded
    assert all(len(notes_of(text)) == text.count("\n") == LIST_LINES for text in first[:8])
    assert all(text.replace(" ", "").startswith("a=") for text in first[8:])


def test_a_question_is_the_beginning_of_a_note():
    assert note("river", "maple") == question("river") + " maple\n"
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize("paths", [["python"], ["python", "recall"], ["recall"]])
def test_the_word_recall_is_for_training_only(monkeypatch, paths):
    files = [SourceFile(f"{n}.py", f"x = {n}\n" * 9) for n in range(8)]
    corpus = PythonCorpus(files, [SourceFile("v.py", "y\n")])
    monkeypatch.setattr(sources, "read_python_corpus", lambda fraction: corpus)
    found = Sources(DataConfig(paths=paths, worked_examples=16))
    sides = {TRAIN: [], VAL: []}
    for side, pieces in found.documents():
        sides[side] += pieces
    assert sides[VAL] == (["y\n"] if "python" in paths else [])
    assert any(notes_of(text) for text in sides[TRAIN]) == ("recall" in paths)
    assert ("x = 3\n" * 9 in sides[TRAIN]) == ("python" in paths)
    others = [Sources(DataConfig(paths=other)).fingerprint for other in (["python"], ["python", "recall"])]
    assert len({*others, Sources(DataConfig(paths=["recall"])).fingerprint}) == 3
