"""Cut a text into passages for a model: definitions of Python, sections of Markdown, blocks of lines.

Two steps. `owners_of` names the part of the text to which each line belongs: `Trainer.step` in Python,
`Usage > Chat` in Markdown. `cut` makes a passage of each run of lines with the same owner, or several that
overlap a little if the model could not read it at once. Every line that is not blank is in a passage, and
only the overlap is in two.
"""

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

OVERLAP = 1 / 8  # of the room, between neighbours that were one
HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$")
FENCE = re.compile(r" {0,3}(```+|~~~+)")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Passage(NamedTuple):
    """A part of a file that is found as one."""

    file: str  # its path within the folder
    first: int  # line, from 1
    last: int
    heading: str  # the file and the place in it, embedded with the text
    text: str


class Piece(NamedTuple):
    """A line, or a part of one that is too long."""

    line: int  # from 0
    text: str
    size: int  # tokens


def passages_of(file: str, text: str, limit: int, sizes: Callable) -> list[Passage]:
    """Return the passages of a file in order.

    limit: tokens that a model reads, heading and text together. sizes: texts -> the number of tokens of each.
    """
    lines = text.split("\n")
    owners = owners_of(file, text, lines)
    pieces = pieces_of(lines, limit // 2, sizes)
    passages = []
    for (_, name), run in groupby(pieces, lambda piece: owners[piece.line]):
        heading = f"{file}: {name}" if name else file
        room = limit - min(sizes([f"{heading}\n"])[0], limit // 2)
        parts = map(without_blank_ends, cut(without_blank_ends([*run]), room))
        passages += [as_passage(file, heading, part) for part in parts if part]
    return passages


def as_passage(file: str, heading: str, pieces: list[Piece]) -> Passage:
    """Return pieces as a passage; parts of one line are joined again."""
    parts = groupby(pieces, lambda piece: piece.line)
    lines = ["".join(piece.text for piece in group) for _, group in parts]
    return Passage(file, pieces[0].line + 1, pieces[-1].line + 1, heading, "\n".join(lines))


def without_blank_ends(pieces: list[Piece]) -> list[Piece]:
    """Return pieces from the first to the last one that is not blank."""
    full = [number for number, piece in enumerate(pieces) if piece.text.strip()]
    return pieces[full[0] : full[-1] + 1] if full else []


# --- owners -----------------------------------------------------------------------------------------------


def owners_of(file: str, text: str, lines: list[str]) -> list[tuple[int, str]]:
    """Return the owner of each line: a number, and a name, which two of them may share."""
    if file.lower().endswith((".py", ".pyi")):
        return python_owners(text, lines)
    return markdown_owners(lines) if file.lower().endswith(".md") else [(0, "")] * len(lines)


def python_owners(text: str, lines: list[str]) -> list[tuple[int, str]]:
    """Name top-level definitions and the methods of classes, with their decorators and comments above."""
    owners = [(0, "")] * len(lines)

    def visit(body: list[ast.stmt], within: str) -> None:
        for node in body:
            if isinstance(node, DEFINITIONS):
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                while first > 1 and lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                owner = (node.lineno, within + node.name)
                owners[first - 1 : node.end_lineno] = [owner] * (node.end_lineno - first + 1)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{owner[1]}.")

    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two for deep nesting
        return owners
    visit(tree.body, "")
    return owners


def markdown_owners(lines: list[str]) -> list[tuple[int, str]]:
    """Name sections by their headings, the outer ones first. `#` in a fenced block is no heading."""
    owners, owner, titles, fence = [], (0, ""), {}, None
    for number, line in enumerate(lines):
        mark = FENCE.match(line)
        if fence and mark and mark[1].startswith(fence):
            fence = None
        elif mark and not fence:
            fence = mark[1]
        elif not fence and (found := HEADING.match(line)):
            level = len(found[1])
            titles = {above: title for above, title in titles.items() if above < level} | {level: found[2]}
            owner = (number, " > ".join(titles.values()))
        owners.append(owner)
    return owners


# --- cuts -------------------------------------------------------------------------------------------------


def pieces_of(lines: list[str], most: int, sizes: Callable) -> list[Piece]:
    """Return the lines, those of more than `most` tokens in parts."""
    parts = list(enumerate(lines))
    while True:
        counts = sizes([f"{text}\n" for _, text in parts])
        pieces = [Piece(line, text, count) for (line, text), count in zip(parts, counts, strict=True)]
        if all(fits(piece, most) for piece in pieces):
            return pieces
        parts = []
        for piece in pieces:  # as many characters as fit on average, and fewer where they do not
            length = len(piece.text)
            step = length if fits(piece, most) else max(1, min(length * most // piece.size, length // 2))
            parts += [(piece.line, piece.text[at : at + step]) for at in range(0, max(1, length), step or 1)]


def fits(piece: Piece, most: int) -> bool:
    """Return True if a piece needs no cut, or allows none."""
    return piece.size <= most or len(piece.text) <= 1


def cut(pieces: list[Piece], room: int) -> Iterator[list[Piece]]:
    """Yield runs of pieces of at most `room` tokens; neighbours share some of them, but always differ."""
    start = 0
    while start < len(pieces):
        end, size = start + 1, pieces[start].size
        while end < len(pieces) and size + pieces[end].size <= room:
            size += pieces[end].size
            end += 1
        yield pieces[start:end]
        start, shared = end, 0
        while end < len(pieces) and start > 0:
            shared += pieces[start - 1].size
            if shared > room * OVERLAP or shared + pieces[end].size > room:
                break
            start -= 1
