"""Read text from files: `.txt`, `.jsonl`, and folders of them, one document at a time.

Nothing is read before it is needed, and no file is held in memory as a whole, so a file may be larger than
memory. Every error is a `UserError` that names the file and the line. A bad record of a `.jsonl` file is
skipped and reported; a file without any good record is an error.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from load_data.chat.records import as_messages, as_text, split_key
from utils.errors import UserError

SUFFIXES = (".txt", ".jsonl")
PIECE = 2**20  # characters of a .txt file that are read at a time
SKIPPED_SHOWN = 3  # skipped records that a summary quotes


def find_files(paths: list[str]) -> list[Path]:
    """Return the `.txt` and `.jsonl` files that `paths` name. Folders are searched recursively, in sorted
    order, and empty files in them ignored. Raises `UserError` for a path with nothing to read."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(
                f"--data {path}: no such file or folder; built in are python (pre-training) and skills (chat)"
            )
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file.suffix.lower() in SUFFIXES and file.is_file()]
        found = [file for file in found if file.stat().st_size]
        if not found:
            raise UserError(
                f"--data {path}: nothing to read; {' and '.join(SUFFIXES)} files with text are read: "
                "convert other files, or rename them if they are text"
            )
        files += found
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise UserError(f"--data {file}: cannot be read ({error.strerror})") from None
    return files


def as_document(record: dict, where: str, same_question: str = "folded") -> tuple[str, str] | None:
    """Return the identity and the text of a record of a `.jsonl` file; None for a blank text. The identity
    decides the side of the split: equal for equal texts, and for conversations with equal `split_key`."""
    text = as_text(record, where)
    try:
        identity = split_key(as_messages(record, where), same_question)
    except UserError:  # plain text
        identity = None
    if identity is None:
        identity = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return (identity, text) if text.strip() else None


def read_pieces(file: Path) -> Iterator[str]:
    """Yield a text file in pieces of about `PIECE` characters, each ending at a line break (or inside a line
    longer than a piece)."""
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


def read_records(file: Path, parse: Callable, skipped: list[str]) -> Iterator:
    """Yield `parse(record, where)` for each JSON object of a `.jsonl` file, unless it is None.

    `where` is "FILE, line N"; blank lines are ignored. A record that `parse` refuses (`UserError`) is left
    out and its error added to `skipped`. Raises the first of these errors if no record is good.
    """
    good, first = False, len(skipped)
    with open(file, encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    where = f"{file}, line {number}"
                    parsed = parse(parse_record(line, where), where)
                except UserError as error:
                    skipped.append(str(error))
                    continue
                good = True
                if parsed is not None:
                    yield parsed
        except UnicodeDecodeError:
            raise not_utf8(file) from None
    if skipped[first:] and not good:
        raise UserError(f"{skipped[first]} (none of the {len(skipped) - first:,} records is usable)")


def skipped_lines(skipped: list[str]) -> list[str]:
    """Return the summary of skipped records: how many, and the first ones with line and reason."""
    lines = [f"skipped records: {len(skipped):,}", *(f"  {one}" for one in skipped[:SKIPPED_SHOWN])]
    more = [f"  ... and {len(skipped) - SKIPPED_SHOWN:,} more"] * (len(skipped) > SKIPPED_SHOWN)
    return [*lines, *more] if skipped else []


def parse_record(line: str, where: str) -> dict:
    """Return the JSON object in `line`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # thousands of digits raise a plain ValueError
        reason = getattr(error, "msg", "too long a number, or nested too deeply")
        raise UserError(
            f"{where}: not valid JSON ({reason}); each line must hold one whole JSON object"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: each line must hold one JSON object, not a {type(record).__name__}")
    return record


def not_utf8(file: Path) -> UserError:
    """Return the error for a file that is not UTF-8; read it again to find the line."""
    with open(file, encoding="utf-8", errors="surrogateescape") as stream:
        number = next(n for n, line in enumerate(stream, start=1) if re.search("[\udc80-\udcff]", line))
    return UserError(f"{file}, line {number}: not UTF-8 text; convert the file to UTF-8 or leave it out")
