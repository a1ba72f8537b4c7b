"""Compare embedding models with BM25, the usual search by words, on held-out pairs of docstring and code.

    python train/lab/compare_search.py                            the model in out/
    python train/lab/compare_search.py --models a.pkl b.pkl minilm several, and the real MiniLM
    python train/lab/compare_search.py --data pairs.jsonl

A query is scored against the documents of all held-out pairs. BM25 (Robertson and Zaragoza, 2009) comes from
the package bm25s, once with its own idea of a word, and once with the words that load_data/code_pairs.py
makes of identifiers; it drops English stop words in both. The held-out files are those that training left
out; a model with another `data.val_fraction` may have seen some of them, and is refused.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

from pathlib import Path

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
import numpy as np
import torch

from config.schema import DataConfig
from inference.generation.load import DEFAULT_OUT
from inference.index.reader import TextReader
from inference.search import MINILM, open_reader
from load_data.code_pairs import words
from load_data.corpora.sources import VAL
from load_data.embed_data import encode_texts, read_pairs
from load_data.items import padded
from model.embedder import embed_by_length
from train.engine.retrieval import measures
from utils.checkpoint import final_name
from utils.device import set_threads
from utils.errors import Parser, UserError, run_main

COLUMNS = ("mrr", "recall1", "recall10")


def main():
    """Print one line for each method."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", metavar="FILE", default=[str(DEFAULT_OUT / final_name("Embed"))],
        help=f"results of train/embed_train.py, or {MINILM} (default: %(default)s)")  # fmt: skip
    add("--data", nargs="+", metavar="PATH", default=["python"], help="python, or .jsonl files of pairs")
    args = parser.parse_args()
    set_threads()
    readers = {name: open_reader(name, DEFAULT_OUT) for name in args.models}
    data = DataConfig(paths=args.data)
    for name, reader in readers.items():
        if name != MINILM and reader.config.data.val_fraction != data.val_fraction:
            raise UserError(f"{name}: data.val_fraction={reader.config.data.val_fraction} is not the usual "
                            f"{data.val_fraction}: it was trained on other files")  # fmt: skip
    pairs = read_pairs(data)[0][VAL]
    queries, documents = [pair.query for pair in pairs], [pair.positive for pair in pairs]
    documents += [text for pair in pairs for text in pair.negatives]
    print(f"{len(queries):,} queries, {len(documents):,} documents\n")
    print(f"{'method':40} {'  '.join(f'{name:>8}' for name in COLUMNS)}")
    show("BM25", bm25(queries, documents))
    show("BM25, identifiers split", bm25([*map(words, queries)], [*map(words, documents)]))
    for name, reader in readers.items():
        show("/".join(Path(name).parts[-2:]), cosines(reader, queries, documents))


def show(name: str, scores: torch.Tensor) -> None:
    """Print the line of one method."""
    found = measures(scores)
    print(f"{name:40} {'  '.join(f'{found[column]:8.3f}' for column in COLUMNS)}")


def bm25(queries: list[str], documents: list[str]) -> torch.Tensor:
    """Return the scores (N, M) of BM25."""
    try:
        import bm25s
    except ImportError:
        raise UserError("BM25 is in a package for comparisons: pip install bm25s") from None
    split = lambda texts: bm25s.tokenize(texts, return_ids=False, show_progress=False)  # noqa: E731
    index = bm25s.BM25()
    index.index(split(documents), show_progress=False)
    nothing = np.zeros(len(documents), dtype=np.float32)  # for a query of stop words alone
    return torch.from_numpy(np.stack([index.get_scores(one) if one else nothing for one in split(queries)]))


@torch.inference_mode()
def cosines(reader: TextReader, queries: list[str], documents: list[str]) -> torch.Tensor:
    """Return the scores (N, M) of an embedding model."""
    settings, tokenizer = reader.config.embed, reader.tokenizer
    vectors = []
    for texts, length in ((queries, settings.query_length), (documents, settings.document_length)):
        ids, mask = padded(encode_texts(texts, tokenizer, settings, length), tokenizer.pad_id)
        device = next(reader.model.parameters()).device
        vectors.append(embed_by_length(reader.model, ids.to(device), mask.to(device)).cpu())
    return vectors[0] @ vectors[1].T


if __name__ == "__main__":
    run_main(main)
