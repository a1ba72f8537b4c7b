"""Turn `data.paths` into documents, each on its side of the split into training and held-out text.

The split is made before anything is learned from the text:

- the word `python`: by file of the standard library (see `load_data/corpora/python_corpus.py`);
- the word `recall`: training files of it again, with lines to remember (see `load_data/corpora/recall.py`);
- a `.txt` file: its last `data.val_fraction` of characters is held out, as is usual for tinyshakespeare;
- a record of a `.jsonl` file: by a hash of its text, or of the questions of a conversation, so that two
  copies are always on the same side.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from itertools import chain, islice, zip_longest
from pathlib import Path

from config.schema import DataConfig
from load_data.corpora.documents import as_document, find_files, read_pieces, read_records
from load_data.corpora.python_corpus import PythonCorpus, docstring_documents, read_python_corpus
from load_data.corpora.recall import recall_documents
from load_data.corpora.reserved import unit_hash
from load_data.corpora.worked_examples import worked_examples
from utils.errors import UserError

PYTHON = "python"  # in data.paths: the standard library
RECALL = "recall"  # some files of it with notes to remember, for training only
BUILT_IN = (PYTHON, RECALL)
TRAIN, VAL = "train", "val"
SPLIT_DOCUMENT = tuple[str, Iterable[str]]  # its side, and its text in pieces


class Sources:
    """The text that a `DataConfig` names. Errors in paths are raised at once, errors in files when read.

    Attributes:
        skipped: errors of the bad records that the last reading of `documents` left out.
    """

    def __init__(self, data: DataConfig):
        self.data, self.skipped = data, []
        self.files = find_files([path for path in data.paths if path not in BUILT_IN])

    @cached_property
    def corpus(self) -> PythonCorpus | None:
        """The standard library, if `data.paths` needs it."""
        return read_python_corpus(self.data.val_fraction) if {*BUILT_IN} & {*self.data.paths} else None

    @property
    def size(self) -> int:
        """Bytes to read, roughly: for the progress bar, and for sampling."""
        python = sum(len(text) for _, (text,) in self.python_documents) if self.corpus else 0
        return python + sum(file.stat().st_size for file in self.files)

    @property
    def summary(self) -> list[str]:
        """One line for each source."""
        lines = [self.corpus.summary] if self.corpus else []
        return lines + [f"{file}: {file.stat().st_size:,} bytes" for file in self.files]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the documents: files (by path, size and modification time, since
        reading a large one twice would cost too much), split, limit, and the code used."""
        data = self.data
        parts = [code_hash(), str(data.val_fraction), str(data.limit), data.same_question]
        if self.corpus:
            built_in = [path for path in BUILT_IN if path in data.paths]
            parts += [self.corpus.digest, str(data.worked_examples), *built_in]
        for file in self.files:
            stat = file.stat()
            parts += [str(file.resolve()), str(stat.st_size), str(stat.st_mtime_ns)]
        return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()

    def documents(self) -> Iterator[SPLIT_DOCUMENT]:
        """Yield every document once: its side and its pieces. Under `data.limit`, every source gives
        an equal share, or all it has; the head and the tail of a `.txt` file count as one document."""
        self.skipped.clear()
        sources = [([one] for one in self.python_documents)] if self.corpus else []
        sources += map(self.documents_of, self.files)
        return chain.from_iterable(limited(sources, self.data.limit))

    def documents_of(self, file: Path) -> Iterator[list[SPLIT_DOCUMENT]]:
        """Yield each record of a `.jsonl` file, or the two parts of a `.txt` file together."""
        if file.suffix.lower() == ".jsonl":
            parse = partial(as_document, same_question=self.data.same_question)
            for identity, text in read_records(file, parse, self.skipped):
                held_out = unit_hash(identity) < self.data.val_fraction
                yield [(VAL if held_out else TRAIN, (text,))]
        else:
            characters = sum(map(len, read_pieces(file)))
            boundary = int(characters * (1 - self.data.val_fraction))
            parts = ((TRAIN, 0, boundary), (VAL, boundary, characters))
            yield [(side, part_of(read_pieces(file), *part)) for side, *part in parts if part[0] < part[1]]

    @cached_property
    def python_documents(self) -> list[SPLIT_DOCUMENT]:
        """Held-out sources; then the other sources, their docstrings, worked examples, and sources with
        notes to recall, shuffled."""
        files, train, held_out = [file.text for file in self.corpus.train], [], []
        if PYTHON in self.data.paths:
            train += files
            train += [text for file in self.corpus.train for text in docstring_documents(file)]
            train += worked_examples(self.data.worked_examples)
            held_out = [file.text for file in self.corpus.val]
        if RECALL in self.data.paths:
            train += recall_documents(files)
        random.Random(0).shuffle(train)
        if self.data.limit:
            # Held-out files come first below, so a limit would otherwise leave nothing to train on.
            share = self.data.limit / (1 + len(self.files))
            held_out = held_out[: max(1, round(share * self.data.val_fraction))]
        return [(VAL, (text,)) for text in held_out] + [(TRAIN, (text,)) for text in train]


def limited(sources: list[Iterator], limit: int | None) -> Iterator:
    """Chain `sources`; with a `limit`, take that many items from them in turn, so that none is starved."""
    if limit is None:
        return chain.from_iterable(sources)
    return islice(filter(None, chain.from_iterable(zip_longest(*sources))), limit)


def part_of(pieces: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """Yield characters `start` to `stop` of a text given in pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(0, start - position) : max(0, stop - position)]
        position += len(piece)
        if part:
            yield part


def empty_side(side: str, data: DataConfig) -> UserError:
    """Return the error for a split that leaves a side empty."""
    name, change = {TRAIN: ("training", "lower"), VAL: ("validation", "raise")}[side]
    return UserError(
        f"--data {' '.join(data.paths)}: after the split there is no {name} text; {change} "
        f"data.val_fraction (now {data.val_fraction}), or give more text"
    )


def code_hash() -> str:
    """Return a hash of the code of load_data/, so that data prepared by another version is not used."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()
