"""From `data.paths` to documents, each on its side of the split into training and validation.

The split is made before anything is learned from the text:

- the word `python`: by file of the standard library (see `load_data/corpora/python_corpus.py`);
- a single `.txt` file: its last `data.val_fraction` of characters is held out, as usual for tinyshakespeare;
- otherwise: by a hash of each document's content, of a conversation its first question, so that two copies
  are always on the same side.
  Of several `.txt` files at least one is held out.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

from config.schema import DataConfig
from load_data.corpora.documents import HASHED_WHOLE, file_identity, find_files, read_documents, read_pieces
from load_data.corpora.python_corpus import PythonCorpus, docstring_documents, read_python_corpus
from load_data.corpora.reserved import unit_hash
from load_data.corpora.worked_examples import worked_examples

PYTHON = "python"  # in data.paths: the standard library
TRAIN, VAL = "train", "val"
SPLIT_DOCUMENT = tuple[str, Iterable[str]]  # its side, and its text in pieces


class Sources:
    """The text that a `DataConfig` names. Errors in paths show at once, errors in files when read."""

    def __init__(self, data: DataConfig):
        self.data = data
        self.files = find_files([path for path in data.paths if path != PYTHON])

    @cached_property
    def corpus(self) -> PythonCorpus | None:
        """The standard library, if it was asked for."""
        return read_python_corpus(self.data.val_fraction) if PYTHON in self.data.paths else None

    @property
    def size(self) -> int:
        """Bytes to read, roughly; for the progress bar."""
        python = sum(len(text) for _, (text,) in self.python_documents) if self.corpus else 0
        return python + sum(file.stat().st_size for file in self.files)

    @property
    def summary(self) -> list[str]:
        """One line for each source."""
        lines = [self.corpus.summary] if self.corpus else []
        return lines + [f"{file}: {file.stat().st_size:,} bytes" for file in self.files]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the documents: contents, split, limit, and the code that makes them.

        A file above `HASHED_WHOLE` bytes is known by its beginning, path, size and time of change instead of
        its content: reading it twice would cost more than it is worth.
        """
        data = self.data
        parts = [code_hash(), str(data.val_fraction), str(data.limit)]
        if self.corpus:
            parts += [self.corpus.digest, str(data.worked_examples)]
        for file in self.files:
            parts += [file.suffix.lower(), file_identity(file)]
            if (stat := file.stat()).st_size > HASHED_WHOLE:
                parts += [str(file.resolve()), str(stat.st_mtime_ns)]
        return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()

    def documents(self) -> Iterator[SPLIT_DOCUMENT]:
        """Every document once: its side and its pieces, at most `data.limit` of them."""
        if not self.corpus and len(self.files) == 1 and self.files[0].suffix.lower() == ".txt":
            return self.halves_of(self.files[0])
        return islice(self.all_documents(), self.data.limit)

    def all_documents(self) -> Iterator[SPLIT_DOCUMENT]:
        """Every document, without the limit."""
        if self.corpus:
            yield from self.python_documents
        texts = {file_identity(file) for file in self.files if file.suffix.lower() == ".txt"}
        always_held_out = min(texts, key=unit_hash) if len(texts) > 1 and not self.corpus else None
        for file in self.files:
            for document in read_documents(file):
                held_out = unit_hash(document.identity) < self.data.val_fraction
                held_out = held_out or document.identity == always_held_out
                yield (VAL if held_out else TRAIN), document.pieces

    def halves_of(self, file: Path) -> Iterator[SPLIT_DOCUMENT]:
        """The beginning of a file for training, its last `data.val_fraction` of characters for validation."""
        characters = sum(map(len, read_pieces(file)))
        boundary = int(characters * (1 - self.data.val_fraction))
        yield TRAIN, part_of(read_pieces(file), 0, boundary)
        yield VAL, part_of(read_pieces(file), boundary, characters)

    @cached_property
    def python_documents(self) -> list[SPLIT_DOCUMENT]:
        """Held-out sources; then the other sources, their docstrings and worked examples, well mixed."""
        train = [file.text for file in self.corpus.train]
        train += [text for file in self.corpus.train for text in docstring_documents(file)]
        train += worked_examples(self.data.worked_examples)
        random.Random(0).shuffle(train)
        held_out = [file.text for file in self.corpus.val]
        if self.data.limit:
            # Held-out files come first below, so a limit would otherwise leave nothing to train on.
            held_out = held_out[: max(1, round(self.data.limit * self.data.val_fraction))]
        return [(VAL, (text,)) for text in held_out] + [(TRAIN, (text,)) for text in train]


def part_of(pieces: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """Characters `start` to `stop` of a text that comes in pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(0, start - position) : max(0, stop - position)]
        position += len(piece)
        if part:
            yield part


def code_hash() -> str:
    """A hash of the code of load_data/, so that nothing prepared by another version of it is used."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()
