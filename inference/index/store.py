"""The index of a folder: its passages with their vectors, on disk, brought up to date where files changed.

A file is read again if its size or time changed, and cut again if its content did. A passage is embedded if
the index has no vector for the same heading and text, so a new line in a long file costs one passage.

An index is one file of tensors and plain data, replaced as a whole. All of it is checked on reading; one that
is damaged, or belongs to another folder or model, is rebuilt.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from tqdm import tqdm

from inference.generation.load import has_form
from inference.index.files import find_files, read_file, text_of
from inference.index.passages import Passage, passages_of
from inference.index.reader import TextReader
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

NAME = "index.pkl"
FORMAT = 1  # of passages: how they are cut, and what of them is embedded
SETTLED = 2 * 10**9  # nanoseconds; a file that changed later may change again without another time
ROUND = 128  # passages that are embedded before the bar moves
KEEP_EVERY = 60  # seconds


class State(NamedTuple):
    """A file as it was when it was read."""

    size: int
    time: int  # of its last change, or 0 if that was just before
    digest: str
    binary: bool


@dataclass
class Index:
    """The searchable content of a folder."""

    key: str  # identifies folder and model
    files: dict[str, State] = field(default_factory=dict)
    passages: list[Passage] = field(default_factory=list)
    vectors: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (N, C), one per passage

    def search(self, query: torch.Tensor, top: int) -> list[tuple[float, Passage]]:
        """Return the `top` passages nearest to `query` (C,) with their cosines; equals in order of files."""
        if not self.passages:
            return []
        scores, order = (self.vectors @ query).sort(descending=True, stable=True)
        best = zip(scores[:top].tolist(), order[:top].tolist(), strict=True)
        return [(score, self.passages[number]) for score, number in best]


def index_key(folder: Path, reader: TextReader) -> str:
    """Return what identifies an index: folder, model, and the form of its passages."""
    parts = f"{folder}\n{reader.identity}\n{FORMAT}"
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def scan(old: Index, folder: Path, reader: TextReader) -> tuple[Index, Counter]:
    """Return the files and passages of `folder` as they are now, without vectors, and what was left out."""
    found, skipped = find_files(folder)
    before = {file: [*group] for file, group in groupby(old.passages, key=lambda passage: passage.file)}
    new = Index(old.key)
    for file, state in found.items():
        was = old.files.get(file)
        if was and (was.size, was.time) == (state.st_size, state.st_mtime_ns):
            new.files[file] = was
            new.passages += before.get(file, [])
            continue
        if (data := read_file(folder / file)) is None:
            skipped["unreadable files"] += 1
            continue
        digest, text = hashlib.sha256(data).hexdigest(), text_of(data)
        settled = time.time_ns() - state.st_mtime_ns > SETTLED
        new.files[file] = State(state.st_size, state.st_mtime_ns * settled, digest, text is None)
        if was and was.digest == digest:
            new.passages += before.get(file, [])
        elif text is not None:
            new.passages += passages_of(file, text, reader.limit, reader.sizes)
    skipped["binary files"] += sum(state.binary for state in new.files.values())
    return new, +skipped


def embed(old: Index, new: Index, reader: TextReader, keep: Callable[[Index], None]) -> int:
    """Give `new` its vectors, those of `old` where it has them; return how many passages were embedded.

    On the way `keep` gets what is ready, so that a long run may be interrupted.
    """
    known = {(one.heading, one.text): vector for one, vector in zip(old.passages, old.vectors, strict=True)}
    missing = {(one.heading, one.text): one for one in new.passages}
    missing = [one for key, one in missing.items() if key not in known]
    kept = time.monotonic()
    with tqdm(total=len(missing), desc="embedding", unit=" passages", leave=False, disable=None) as bar:
        for first in range(0, len(missing), ROUND):
            part = missing[first : first + ROUND]
            keys = [(one.heading, one.text) for one in part]
            known |= zip(keys, reader.passages(part), strict=True)
            bar.update(len(part))
            if time.monotonic() - kept > KEEP_EVERY:
                keep(ready(new, known))
                kept = time.monotonic()
    new.vectors = ready(new, known).vectors
    return len(missing)


def ready(index: Index, known: dict[tuple[str, str], torch.Tensor]) -> Index:
    """Return the part of an index with the files all of whose passages have vectors in `known`."""
    waiting = {one.file for one in index.passages if (one.heading, one.text) not in known}
    files = {file: state for file, state in index.files.items() if file not in waiting}
    passages = [one for one in index.passages if one.file in files]
    vectors = [known[one.heading, one.text] for one in passages]
    return Index(index.key, files, passages, torch.stack(vectors) if vectors else torch.empty(0, 0))


def write_index(path: Path, index: Index) -> None:
    """Write an index, all or nothing."""
    files = {file: list(state) for file, state in index.files.items()}
    passages = [list(passage) for passage in index.passages]
    entries = {"short": "Search", "key": index.key, "files": files, "passages": passages}
    save_checkpoint(path, entries | {"vectors": index.vectors})


def read_index(path: Path, key: str, width: int, tell: Callable[[str], None]) -> Index:
    """Return the index in `path`, or an empty one if there is none that can be used; `tell` is told why."""
    if not path.exists():
        return Index(key)
    try:
        data = load_checkpoint(path)
    except UserError:
        data = {}
    if fault := fault_of(data, key, width):
        tell(f"{path}: {fault}; it is rebuilt")
        return Index(key)
    files = {file: State(*state) for file, state in data["files"].items()}
    return Index(key, files, [Passage(*one) for one in data["passages"]], data["vectors"])


def fault_of(data: dict, key: str, width: int) -> str | None:
    """Return the fault of the content of an index file, or None. A stranger may have written it."""
    form = {"key": str, "files": {}, "passages": [is_passage], "vectors": torch.Tensor}
    if not has_form(data, form):
        return "no index, or a damaged one"
    if data["key"] != key:
        return "the index of another folder or model"
    files, passages, vectors = data["files"], data["passages"], data["vectors"]
    sound = all(is_inside(file) and is_state(state) for file, state in files.items())
    sound = sound and all(passage[0] in files for passage in passages)
    plain = (vectors.dtype, vectors.layout) == (torch.float32, torch.strided)
    fits = plain and vectors.shape == ((len(passages), width) if passages else (0, 0))
    return None if sound and fits and vectors.isfinite().all() else "a damaged index"


def is_passage(value) -> bool:
    """Return True for the list of a passage."""
    kinds = [str, int, int, str, str]
    return isinstance(value, list) and [*map(type, value)] == kinds and 1 <= value[1] <= value[2]


def is_state(value) -> bool:
    """Return True for the list of a state."""
    return isinstance(value, list) and [*map(type, value)] == [int, int, str, bool]


def is_inside(file) -> bool:
    """Return True for a path that cannot leave the folder."""
    return isinstance(file, str) and not PurePath(file).anchor and ".." not in PurePath(file).parts
