"""Documents -> one long row of token ids per side, in memory-mapped files.

A prepared data set is a folder `tokens_<hash>` with `train.bin`, `val.bin` (token ids, uint16 if they fit)
and `meta.json`. It is renamed when complete, and its name is a hash of everything that decides its content,
so neither a half-written nor an outdated one is ever found.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config.schema import RunConfig
from load_data.corpora.documents import skipped_lines
from load_data.corpora.sources import TRAIN, VAL, Sources, empty_side
from load_data.tokenization.tokenizer import Tokenizer
from load_data.tokenization.train_tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH = 2**20  # characters that are encoded at a time


@dataclass(frozen=True)
class PretrainData:
    """The data of pre-training. `train` and `val` are one-dimensional rows of token ids, mapped from disk."""

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    summary: list[str]  # lines to print
    digest: str  # identifies the tokens: a resumed run requires the same


def prepare_pretraining(
    config: RunConfig, tokenizer: Tokenizer | None = None, special: Sequence[str] = ()
) -> PretrainData:
    """Return the token rows that `config.data` names, prepared now or cached. Without a `tokenizer`, one is
    trained on the training side, never on held-out text; it gets the tokens `special` that it lacks. Raises
    `UserError` for text that cannot be read and for a split that leaves a side empty."""
    cache_dir = REPOSITORY / config.data.cache_dir  # an absolute path stays as it is
    sources = Sources(config.data)
    if tokenizer is None:
        texts = (piece for side, pieces in sources.documents() if side == TRAIN for piece in pieces)
        tokenizer = train_tokenizer(config.tokenizer, texts, cache_dir, sources.fingerprint, sources.size)
    tokenizer = tokenizer.with_special(special)
    decides = [sources.fingerprint, tokenizer.digest]
    folder = prepared_folder(cache_dir, "tokens", decides, write_folder, sources, tokenizer)
    return open_folder(folder, sources, tokenizer)


def open_folder(folder: Path, sources: Sources, tokenizer: Tokenizer) -> PretrainData:
    """Map the prepared data set in `folder` and describe it."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    rows = {side: np.memmap(folder / f"{side}.bin", dtype=meta["dtype"], mode="r") for side in (TRAIN, VAL)}
    summary = [*sources.summary, *meta["skipped"]]
    summary.append(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.digest}")
    for side in (TRAIN, VAL):
        counts = meta[side]
        summary.append(
            f"{side}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
            f"{counts['tokens']:,} tokens, {counts['bytes'] / counts['tokens']:.2f} bytes per token"
        )
    return PretrainData(tokenizer, rows[TRAIN], rows[VAL], summary, meta["digest"])


def prepared_folder(cache_dir: Path, kind: str, decides: list, write: Callable, *given) -> Path:
    """Return the folder named by a hash of `decides`. If it is missing, `write(folder, *given)` fills it."""
    folder = cache_dir / f"{kind}_{hashlib.sha256(repr(decides).encode('utf-8')).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="partial_", dir=folder.parent))
    try:
        write(unfinished, *given)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process finished first, with the same result
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_folder(folder: Path, sources: Sources, tokenizer: Tokenizer) -> None:
    """Encode all documents into `folder`."""
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    with tqdm(total=sources.size, desc="encoding", unit="B", unit_scale=True, disable=None) as bar:
        paths = {side: folder / f"{side}.bin" for side in (TRAIN, VAL)}
        writers = {side: TokenWriter(path, tokenizer, dtype, bar) for side, path in paths.items()}
        for side, pieces in sources.documents():
            writers[side].add_document(pieces)
        for writer in writers.values():
            writer.flush()
    for side, writer in writers.items():
        if writer.counts["tokens"] < 2:
            raise empty_side(side, sources.data)
    meta = {"dtype": dtype, "digest": tokens_digest(tokenizer, writers)}
    meta["skipped"] = skipped_lines(sources.skipped)
    meta |= {side: writer.counts for side, writer in writers.items()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


class TokenWriter:
    """Write documents as ids into a file, separated by end-of-text tokens, a bounded amount at a time."""

    def __init__(self, path: Path, tokenizer: Tokenizer, dtype: str, bar: tqdm):
        self.path, self.tokenizer, self.dtype, self.bar = path, tokenizer, dtype, bar
        self.hash = hashlib.sha256()
        self.counts = {"documents": 0, "bytes": 0, "tokens": 0}  # written so far
        self.waiting: list[str | None] = []  # pieces of text; None starts a new document
        self.characters = 0

    def add_document(self, pieces: Iterable[str]) -> None:
        """Add one document, given in pieces."""
        if self.counts["documents"]:
            self.waiting.append(None)
        self.counts["documents"] += 1
        for piece in pieces:
            self.waiting.append(piece)
            self.characters += len(piece)
            if self.characters >= BATCH:
                self.flush()

    def flush(self) -> None:
        """Encode and write the waiting pieces."""
        encoded = iter(self.tokenizer.encode_open([piece for piece in self.waiting if piece is not None]))
        separator = self.tokenizer.separator
        with self.path.open("ab") as file:
            for piece in self.waiting:
                ids = np.array(separator if piece is None else next(encoded), dtype=self.dtype)
                file.write(ids.tobytes())
                self.hash.update(ids.tobytes())
                self.counts["tokens"] += len(ids)
                size = len((piece or "").encode("utf-8", "surrogatepass"))  # 3 bytes for a lone surrogate
                self.counts["bytes"] += size
                self.bar.update(size)
        self.waiting, self.characters = [], 0


def tokens_digest(tokenizer: Tokenizer, writers: dict[str, TokenWriter]) -> str:
    """Return 16 hexadecimal digits from the tokenizer and every token of both sides."""
    parts = [tokenizer.digest, *(writer.hash.hexdigest() for writer in writers.values())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
