"""Passages: names and lines by hand, and for any text, that nothing is lost and only overlap is twice."""

import random
from pathlib import Path

import pytest

from inference.index import passages
from inference.index.passages import passages_of

ROOT = Path(__file__).resolve().parents[3]
PYTHON = '''"""Say what it is."""
import os

LIMIT = 3

# Add numbers.
# Slowly.
@cache
@other(
    1)
def add(a, b):
    # not a heading
    return a + b
def near(): return 1


class Shape:
    """Form."""

    sides = 0

    def __init__(self):
        self.x = 1

    @property
    async def area(self):
        def inner(): pass
        return 0

    @area.setter
    def area(self, value): pass

    class Inner:
        def deep(self): pass
    tail = 1

if LIMIT:
    def hidden(): pass
'''
MARKDOWN = """before

# First #
words
## Inner *one*
```
# no heading
~~~
```
### Deepest
~~~~
```
# no heading
~~~~
## Inner two
#hashtag
# Second

"""


def of_bytes(texts):
    return [len(text.encode()) for text in texts]


def table(file, text, limit=1000):
    return [(one.first, one.last, one.heading.removeprefix(file).removeprefix(": "))
            for one in passages_of(file, text, limit, of_bytes)]  # fmt: skip


def test_python_by_definitions():
    assert table("a/b.py", PYTHON) == [
        (1, 4, ""), (6, 13, "add"), (14, 14, "near"), (17, 20, "Shape"), (22, 23, "Shape.__init__"),
        (25, 28, "Shape.area"), (30, 31, "Shape.area"), (33, 33, "Shape.Inner"), (34, 34, "Shape.Inner.deep"),
        (35, 35, "Shape"), (37, 38, ""),
    ]  # fmt: skip
    first = passages_of("a/b.py", PYTHON, 1000, of_bytes)[0]
    assert first.heading == "a/b.py" and first.text == '"""Say what it is."""\nimport os\n\nLIMIT = 3'


def test_markdown_by_headings():
    assert table("a.md", MARKDOWN) == [
        (1, 1, ""), (3, 4, "First"), (5, 9, "First > Inner *one*"), (10, 14, "First > Inner *one* > Deepest"),
        (15, 16, "First > Inner two"), (17, 17, "Second"),
    ]  # fmt: skip


BROKEN = ["def f(:\n\n  x\n", "x = '\0'", "(" * 5000, "-" * 100_000 + "1", "\ud800 = 1"]


def test_neighbours_of_the_same_name_are_two():
    assert table("a.py", "def f(): return 1\ndef f(): return 2\n") == [(1, 1, "f"), (2, 2, "f")]
    assert table("a.md", "# One\na\n# One\nb\n") == [(1, 2, "One"), (3, 4, "One")]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_python_that_does_not_parse_becomes_blocks(text):
    found = passages_of("a.py", text, 1000, lambda texts: [len(one) for one in texts])
    assert {one.heading for one in found} == {"a.py"}
    assert "".join("".join(one.text for one in found).split())[:50] == "".join(text.split())[:50]


def awkward_texts():
    draw = random.Random(0)
    yield from ("", "\n", " \n\t\n", "x", "x\n", "\n\n x\n\n", "a" * 5000, "ab " * 2000, "\u6f22" * 700)
    yield "short\n" + "long " * 300 + "\nshort\n\n\nshort"
    yield "\n".join("w" * draw.choice((0, 0, 1, 5, 40, 90, 300)) for _ in range(200))
    yield "\x0b\x0c\n\x1c a\u2028b\x85c\nd\n"  # what `splitlines` takes for ends of lines
    yield from (PYTHON, MARKDOWN, PYTHON * 30)
    yield from (path.read_text(encoding="utf-8") for path in sorted((ROOT / "utils").glob("*.py"))[:6])


@pytest.mark.parametrize("limit", [40, 64, 250])
@pytest.mark.parametrize("file", ["a.py", "a.md", "a.txt"])
def test_every_line_is_in_one_passage(file, limit, monkeypatch):
    """Without overlap, the passages in order are the text; what a passage says of its lines is true."""
    monkeypatch.setattr(passages, "OVERLAP", 0)
    for text in awkward_texts():
        found = passages_of(file, text, limit, of_bytes)
        assert "".join("".join(one.text for one in found).split()) == "".join(text.split())
        lines = text.split("\n")
        for one in found:
            assert one.text in "\n".join(lines[one.first - 1 : one.last])
            assert one.text.split("\n")[0].strip() and one.text.split("\n")[-1].strip()
            room = max(limit - len(one.heading) - 1, limit - limit // 2)
            assert len(one.text.encode()) <= room


def test_neighbours_overlap_a_little():
    """Ten lines of five bytes fit (the line break counts), so one, of the ten a tenth, is in two passages."""
    lines = [f"{number:04}" for number in range(100)]
    found = passages_of("a.txt", "\n".join(lines), 56, of_bytes)  # the heading takes six
    assert [(one.first, one.last) for one in found] == [(1 + 9 * n, 10 + 9 * n) for n in range(11)]
    for limit in (40, 64, 250):
        for text in awkward_texts():
            found = passages_of("a.txt", text, limit, of_bytes)
            whole = "\n".join(one.text for one in found)
            assert all(line.strip() in whole for line in text.split("\n") if len(line.encode()) < limit // 2)
            starts, ends = [one.first for one in found], [one.last for one in found]
            assert starts == sorted(starts) and ends == sorted(ends)
            shared = sum(len(one.text.encode()) for one in found) - len("".join(text.split()).encode())
            assert shared <= len(text.encode()) * 0.5  # an eighth of each, and the white space


def test_no_passage_repeats_the_end_of_another():
    """The next line would not fit behind what the two would share, so they share nothing."""
    file = "a" * 40 + ".txt"  # takes half of the limit
    assert table(file, "\n".join(("a" * 20, "bb", "c" * 28)), limit=60) == [(1, 2, ""), (3, 3, "")]


def test_a_long_line_is_cut_where_tokens_are_dense():
    """Characters of three bytes behind characters of one: the first cut, by the average, is not enough."""
    text = "a" * 300 + "\u6f22" * 300
    found = passages_of("a.txt", text, 64, of_bytes)
    assert max(len(one.text.encode()) for one in found) <= 64 - len("a.txt\n") and len(found) > 20
    assert {(one.first, one.last) for one in found} == {(1, 1)}
