"""Pairs from source: what is a query, what is a document, and that real files give what they contain."""

import ast

import pytest

from load_data.code_pairs import docstring_pairs, further_pairs, words
from load_data.corpora.python_corpus import SourceFile

SOURCE = '''"""A module."""
import os


class Reader(object):
    """Read files one line at a time.

    The rest of it, long enough to say something.
    """

    limit = 3

    @property
    def lastLine(self):
        """Return the last line read,
        without its end."""
        # É before the next string
        value = "é"; return value

    async def weitergehört(self): "Skip a line: the docstring stands beside the code."; return 1

    def __len__(self):
        """Short."""
        return 0

\f
def open_it(path):
    # look for the file in the usual places
    # of this system
    for place in os.environ:
        print(place)

    return Reader(path)
'''


def test_the_pairs_of_a_file():
    found = list(docstring_pairs(SourceFile("a.py", SOURCE)))
    assert found == [
        ("Return the last line read, without its end.",
         '@property\ndef lastLine(self):\n    # É before the next string\n    value = "é"; return value'),
        ("Skip a line: the docstring stands beside the code.", "async def weitergehört(self): return 1"),
    ]  # fmt: skip


def test_the_further_pairs_of_a_file():
    found = dict(further_pairs(SourceFile("a.py", SOURCE)))
    reader = found.pop("Read files one line at a time.")
    assert reader.startswith("class Reader(object):\n    limit = 3\n    @property")
    assert reader.endswith("def __len__(self):\n        \"\"\"Short.\"\"\"\n        return 0")
    assert found.pop("The rest of it, long enough to say something.") == reader
    assert found.pop("Reader") == reader.replace("Reader", "_")
    assert found.pop("lastLine").startswith("@property\ndef _(self):")
    opens = found.pop("open_it")
    assert opens.startswith("def _(path):\n    # look for") and opens.endswith("\n    return Reader(path)")
    code = "for place in os.environ:\n    print(place)"
    assert found == {"look for the file in the usual places of this system": code,
                     "É before the next string": 'value = "é"; return value'}  # fmt: skip


def test_what_is_no_python_gives_nothing():
    for text in ("def (:", "x = 1\0", "", "# only a comment of five words"):
        file = SourceFile("a.py", text)
        assert not [*docstring_pairs(file), *further_pairs(file)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("def read_file(self):", " def read file self"), ("aXMLParser2Go", " a xml parser 2 go"),
     ("HTTPServer __init__ x=10", " http server init x 10"), ("Größe 文件 читать", " größe 文件 читать"),
     ("+= ()", ""), ("IOError can't", " io error can t")],
)  # fmt: skip
def test_words(text, expected):
    assert words(text) == expected


def test_real_files_give_their_functions(library):
    """Every function with a docstring of useful length gives one pair, whose source parses again and has no
    docstring; the query begins it."""
    for file in library.val[:12] + library.train[:4]:
        tree = ast.parse(file.text)
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        docstrings = [" ".join(text.split()) for text in found if len(text.strip()) >= 20]
        pairs = list(docstring_pairs(file))
        assert len(pairs) == len(docstrings)
        for (query, document), docstring in zip(pairs, docstrings):
            assert docstring.startswith(query) and query
            parsed = ast.parse(document + "\n    pass" * document.endswith(":"))
            assert ast.get_docstring(parsed.body[0]) is None
