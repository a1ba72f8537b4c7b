"""Reading text from files: `.txt`, `.jsonl`, and folders of them, one document at a time.

Nothing is read before it is asked for, and no file is held in memory whole, so a file may be larger than
memory. Every complaint is a `UserError` that names the file and the line.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from load_data.chat.records import as_text, first_question
from utils.errors import UserError

SUFFIXES = (".txt", ".jsonl")
PIECE = 2**20  # characters of a .txt file that are read at a time
HASHED_WHOLE = 2**28  # bytes; a larger file is identified by its size and its first part


@dataclass(frozen=True)
class Document:
    """A text, in one or more pieces, and what decides its side of the split: equal texts have equal
    identities, and so have conversations with the same first question."""

    identity: str
    pieces: Iterable[str]


def find_files(paths: list[str]) -> list[Path]:
    """The `.txt` and `.jsonl` files that `paths` mean. Folders are searched through, in sorted order; an
    empty file
    in a folder is passed over. Raises `UserError` for a path that gives nothing to read."""
    known = " and ".join(SUFFIXES)
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [
                file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()
            ]
            found = [file for file in found if file.stat().st_size]
            if not found:
                raise UserError(f"--data {path}: no file with text in this folder; {known} files are read")
            files += found
        elif not path.exists():
            raise UserError(
                f"--data {path}: no such file or folder; the word python means the standard library"
            )
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"--data {path}: {known} files are read; convert the file, or rename it if it is text"
            )
        elif not path.stat().st_size:
            raise UserError(f"--data {path}: the file is empty; put text into it or leave it out")
        else:
            files.append(path)
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise UserError(f"--data {file}: cannot be read ({error.strerror})") from None
    return files


def read_documents(file: Path) -> Iterator[Document]:
    """The documents of one file: all of a `.txt`, each record of a `.jsonl`."""
    if file.suffix.lower() == ".jsonl":
        for record, where in read_records(file):
            text = as_text(record, where)
            if text.strip():  # records without text are passed over
                question = first_question(record, where)
                yield Document(text_identity(text) if question is None else question, (text,))
    else:
        yield Document(file_identity(file), read_pieces(file))


def read_pieces(file: Path) -> Iterator[str]:
    """A text file in pieces of about `PIECE` characters that end with a line (or in a line longer than a
    piece).
    """
    line = 1
    with open(file, encoding="utf-8-sig") as stream:
        try:
            while piece := stream.read(PIECE) + stream.readline(PIECE):
                if "\0" in piece:
                    line += piece[: piece.index("\0")].count("\n")
                    raise UserError(f"{file}, line {line}: a NUL byte: this is a binary file, not text")
                line += piece.count("\n")
                yield piece
        except UnicodeDecodeError:
            raise not_utf8(file) from None


def read_records(file: Path) -> Iterator[tuple[dict, str]]:
    """Each JSON object of a `.jsonl` file and where it stands ("FILE, line N"); blank lines do not count."""
    with open(file, encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield parse_record(line, where), where
        except UnicodeDecodeError:
            raise not_utf8(file) from None


def parse_record(line: str, where: str) -> dict:
    """The JSON object in `line`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        reason = getattr(error, "msg", "too long a number, or nested too deeply")
        raise UserError(
            f"{where}: not valid JSON ({reason}); each line must hold one whole JSON object"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: each line must hold one JSON object, not a {type(record).__name__}")
    return record


def not_utf8(file: Path) -> UserError:
    """The error for a file that is not UTF-8; reads it again to find the line."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return UserError(
                    f"{file}, line {number}: not UTF-8 text; convert the file to UTF-8 or leave it out"
                )
    return UserError(f"{file}: not UTF-8 text")


def text_identity(text: str) -> str:
    """What identifies a text: a hash of it."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_identity(file: Path) -> str:
    """What identifies the content of a file: its hash, or if very large that of its size and beginning."""
    size = file.stat().st_size
    total = hashlib.sha256()
    with open(file, "rb") as stream:
        if size > HASHED_WHOLE:
            total.update(str(size).encode() + stream.read(PIECE))
        else:
            while block := stream.read(PIECE):
                total.update(block)
    return total.hexdigest()
