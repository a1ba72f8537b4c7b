"""Pairs of a text and the code it describes, from Python source: what an embedding model learns from.

    query       the first paragraph of the docstring of a function or method
    document    its source, decorators included, without the docstring

That is the task of CodeSearchNet (arXiv 1909.09436), and held-out files are scored on it. Training files give
more kinds of pairs, since docstrings are few: see `further_pairs`.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import lru_cache

from load_data.corpora.python_corpus import SHORTEST_DOCSTRING, SourceFile

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SHORTEST_COMMENT = 4  # words
LINES_AFTER = 8  # of code that a comment may describe
CASES = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between the words of aName, XMLFile
WORD = re.compile(r"\d+|[^\W\d_]+")
Pairs = Iterator[tuple[str, str]]


def words(text: str) -> str:
    """Return the words of a text in lower case, each after a space: identifiers are split at underscores and
    capitals, and punctuation is left out. So `readFile`, `read_file` and "Read file" are alike."""
    return "".join(f" {word.lower()}" for word in WORD.findall(CASES.sub(" ", text)))


def docstring_pairs(file: SourceFile) -> Pairs:
    """Yield the docstring and the source of each function."""
    for node, lines in definitions(file, FUNCTIONS):
        if docstring := useful_docstring(node):
            yield first_paragraph(docstring), source_of(node, lines)


def further_pairs(file: SourceFile) -> Pairs:
    """Yield more pairs to learn from: the rest of a docstring and the source; the name of a function or class
    and the source without that name; the docstring of a class and its source; a comment and what follows."""
    for node, lines in definitions(file, (*FUNCTIONS, ast.ClassDef)):
        source, docstring = source_of(node, lines), useful_docstring(node)
        if docstring and isinstance(node, ast.ClassDef):
            yield first_paragraph(docstring), source
        _, _, rest = docstring.partition("\n\n")
        if len(rest.strip()) >= SHORTEST_DOCSTRING:
            yield " ".join(rest.split()), source
        if "\n" in source and not node.name.startswith("__"):
            yield node.name, re.sub(rf"\b{re.escape(node.name)}\b", "_", source)
    yield from comment_pairs(file.text.split("\n"))


def comment_pairs(lines: list[str]) -> Pairs:
    """Yield each comment on lines of its own with the block of code below it."""
    number = 0
    while number < len(lines):
        start = number
        while number < len(lines) and lines[number].lstrip().startswith("#"):
            number += 1
        comment = " ".join(line.strip().lstrip("#").strip() for line in lines[start:number])
        code = lines[number : number + LINES_AFTER]
        stops = (n for n, line in enumerate(code) if ends_block(line, depth(lines[start])))
        code = code[: next(stops, len(code))]
        if code and len(comment.split()) >= SHORTEST_COMMENT:
            yield comment, textwrap.dedent("\n".join(code))
        number = max(number, start + 1)


def ends_block(line: str, comment_depth: int) -> bool:
    """Return whether a line is no longer part of the code under a comment with this indentation."""
    return not line.strip() or line.lstrip().startswith("#") or depth(line) < comment_depth


def depth(line: str) -> int:
    """Return the number of characters that a line is indented by."""
    return len(line) - len(line.lstrip())


def definitions(file: SourceFile, kinds: tuple) -> Iterator[tuple[ast.AST, list[str]]]:
    """Yield each definition of these kinds, at any depth, and the lines of the file."""
    lines = file.text.split("\n")  # not `splitlines`, which also cuts at form feeds
    yield from ((node, lines) for node in all_definitions(file.text) if isinstance(node, kinds))


@lru_cache(maxsize=1)  # both kinds of pairs are asked for, one file after the other
def all_definitions(text: str) -> list[ast.AST]:
    """Return the functions and classes of a source; none of a template, which cannot be parsed."""
    try:
        return [node for node in ast.walk(ast.parse(text)) if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    except (SyntaxError, ValueError):
        return []


def useful_docstring(node: ast.AST) -> str:
    """Return the docstring of a definition, "" if it has none or a very short one."""
    docstring = (ast.get_docstring(node) or "").strip()
    return docstring if len(docstring) >= SHORTEST_DOCSTRING else ""


def first_paragraph(docstring: str) -> str:
    """Return the first paragraph on one line."""
    return " ".join(docstring.split("\n\n")[0].split())


def source_of(node: ast.AST, lines: list[str]) -> str:
    """Return the source of a definition without its docstring and without blank lines, dedented."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[first - 1 : node.end_lineno]
    if ast.get_docstring(node, clean=False) is not None:
        text = node.body[0]
        # The offsets that `ast` gives count bytes.
        before = lines[text.lineno - 1].encode()[: text.col_offset].decode()
        after = lines[text.end_lineno - 1].encode()[text.end_col_offset :].decode()
        beside = before + after.lstrip("; ")  # "def f(self): 'docstring'; return 1"
        kept = [*lines[first - 1 : text.lineno - 1], beside, *lines[text.end_lineno : node.end_lineno]]
    return textwrap.dedent("\n".join(line for line in kept if line.strip()))
