"""Pairs of a query and its document: read, split, encoded.

The word `python` in `data.paths` means the standard library (load_data/code_pairs.py), split by file as in
pre-training. A record of a `.jsonl` file is `{"query", "positive"}`, optionally with `"negatives"`, a list of
texts that look right and are not; the hash of its query decides its side.

Among held-out pairs each query and each document occurs once, so that only one answer is right. A training
pair is left out if its query or document is held out, whatever the case, the punctuation and the white space
in them; if its code is a held-out function in another form, without its name for example; or if the same pair
came before.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from config.objectives import EmbedConfig
from config.schema import DataConfig, RunConfig
from load_data.chat.records import question_key, string
from load_data.code_pairs import docstring_pairs, further_pairs, words
from load_data.corpora.documents import find_files, read_records, skipped_lines
from load_data.corpora.python_corpus import PythonCorpus, read_python_corpus
from load_data.corpora.reserved import unit_hash
from load_data.corpora.sources import PYTHON, TRAIN, VAL, code_hash, empty_side, limited
from load_data.packing import REPOSITORY
from load_data.tokenization.tokenizer import Tokenizer
from load_data.tokenization.train_tokenizer import train_tokenizer
from utils.errors import UserError

KEYS = ("query", "positive")  # of a record
FORM = '{"query": text, "positive": text}, with "negatives": [texts] if there are any'
KINDS = (docstring_pairs, further_pairs)  # of pairs to train on


class Pair(NamedTuple):
    """A query, its document, and documents that are wrong answers to it."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


class Texts(Sequence):
    """Texts as ids, stored end to end. Items are arrays (n,) int32."""

    def __init__(self, texts: Iterable[list[int]]):
        rows = [np.array(ids, dtype=np.int32) for ids in texts]
        self.ids = np.concatenate([np.zeros(0, np.int32), *rows])
        self.bounds = np.cumsum([0, *map(len, rows)])
        # Equal for texts that the model cannot tell apart, which must not be each other's negatives.
        self.keys = np.array([text_key(ids) for ids in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.bounds[:-1][index] : self.bounds[1:][index]]


class EncodedPairs(NamedTuple):
    """Query i has the documents `first[i]` to `first[i + 1]`: the right one, then wrong ones."""

    queries: Texts
    documents: Texts
    first: np.ndarray  # (N + 1,)


@dataclass(frozen=True)
class EmbedData:
    """The data of an embedding model."""

    tokenizer: Tokenizer
    train: EncodedPairs
    val: EncodedPairs
    summary: list[str]  # lines to print
    digest: str  # identifies all ids


def prepare_embedding(config: RunConfig, tokenizer: Tokenizer | None = None) -> EmbedData:
    """Return the pairs that `config.data` names. Without a `tokenizer`, one is trained on those to train on.
    Raises `UserError` for data without pairs and for a split that leaves a side empty."""
    pairs, summary = read_pairs(config.data)
    if tokenizer is None:
        texts = (text for pair in pairs[TRAIN] for text in (*pair[:2], *pair.negatives))
        texts = [read_as(text, config.embed) for text in texts]
        key = hashlib.sha256("\0".join([code_hash(), *texts]).encode("utf-8", "surrogatepass")).hexdigest()
        size = sum(map(len, texts))
        tokenizer = train_tokenizer(config.tokenizer, texts, REPOSITORY / config.data.cache_dir, key, size)
    summary.append(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.digest}")
    sides = {side: encode_pairs(pairs[side], tokenizer, config.embed) for side in (TRAIN, VAL)}
    for side, (queries, documents, _) in sides.items():
        tokens = len(queries.ids) + len(documents.ids)
        summary.append(f"{side}: {len(queries):,} queries, {len(documents):,} documents, {tokens:,} tokens")
    content = hashlib.sha256(tokenizer.digest.encode())
    for texts in (texts for side in sides.values() for texts in side[:2]):
        content.update(texts.ids.tobytes() + texts.bounds.tobytes())
    return EmbedData(tokenizer, sides[TRAIN], sides[VAL], summary, content.hexdigest()[:16])


def read_pairs(data: DataConfig) -> tuple[dict[str, list[Pair]], list[str]]:
    """Return the pairs of each side, repetitions left out, and lines to print."""
    summary, skipped, sources = [], [], []
    if PYTHON in data.paths:
        corpus = read_python_corpus(data.val_fraction)
        summary.append(corpus.summary)
        sources.append(library_pairs(corpus, data))
    files = find_files([path for path in data.paths if path != PYTHON])
    if others := [str(file) for file in files if file.suffix.lower() != ".jsonl"]:
        raise UserError(f"--data {others[0]}: pairs are read from .jsonl: {FORM}")
    sources += [read_records(file, partial(as_pair, data=data), skipped) for file in files]
    found = {VAL: [], TRAIN: []}
    for side, pair in limited(sources, data.limit):
        found[side].append(pair)
    sides, known = {}, (set(), set())  # held-out queries and documents
    held_out = corpus.val if PYTHON in data.paths else ()
    forms = {folded(document) for file in held_out for _, document in further_pairs(file)}  # of the same code
    for side, pairs in found.items():
        kept = held_out_once(pairs, known) if side == VAL else unseen(pairs, (known[0], known[1] | forms))
        kept = [*dict.fromkeys(kept)]
        sides[side], gone = kept, len(pairs) - len(kept)
        if not kept:
            raise empty_side(side, data)
        why = "query or document repeated" if side == VAL else "held out or repeated"
        summary.append(f"{side}: {gone:,} of {len(pairs):,} pairs left out ({why})")
    return sides, summary + skipped_lines(skipped)


def library_pairs(corpus: PythonCorpus, data: DataConfig) -> Iterator[tuple[str, Pair]]:
    """Yield the pairs of the standard library with their side, those to train on shuffled."""
    held_out = [Pair(*pair) for file in corpus.val for pair in docstring_pairs(file)]
    train = [Pair(*pair) for file in corpus.train for kind in KINDS for pair in kind(file)]
    random.Random(0).shuffle(train)
    if data.limit:  # held-out pairs come first, so a limit would otherwise leave nothing to train on
        held_out = held_out[: max(1, round(data.limit * data.val_fraction))]
    yield from chain(((VAL, pair) for pair in held_out), ((TRAIN, pair) for pair in train))


def as_pair(record: dict, where: str, data: DataConfig) -> tuple[str, Pair]:
    """Return a record as a pair with its side. Raises `UserError` that begins with `where`."""
    if missing := [key for key in KEYS if key not in record]:
        raise UserError(f"{where}: no {' and no '.join(missing)}; a pair is {FORM}")
    query, positive = (string(record, key, where) for key in KEYS)
    negatives = record.get("negatives") or []
    if not isinstance(negatives, list) or not all(isinstance(one, str) for one in negatives):
        raise UserError(f"{where}: negatives must be a list of texts")
    if blank := [key for key, text in zip(KEYS, (query, positive)) if not text.strip()]:
        raise UserError(f"{where}: {' and '.join(blank)} without text")
    held_out = unit_hash(question_key(query, data.same_question)) < data.val_fraction
    return (VAL if held_out else TRAIN), Pair(query, positive, tuple(negatives))


def held_out_once(pairs: list[Pair], known: tuple[set, set]) -> list[Pair]:
    """Return the pairs whose query and document are new, and add those to `known`."""
    kept = []
    for pair in pairs:
        keys = [*map(folded, pair[:2])]
        if not any(key in texts for key, texts in zip(keys, known)):
            kept.append(pair)
            for key, texts in zip(keys, known):
                texts.add(key)
    return kept


def unseen(pairs: list[Pair], known: tuple[set, set]) -> Iterator[Pair]:
    """Yield the pairs of which neither query nor document is in `known`."""
    for pair in pairs:
        if not any(folded(text) in texts for text, texts in zip(pair[:2], known)):
            yield pair


def folded(text: str) -> str:
    """Return the words of a text, or what is there if it has none, to find repetitions."""
    return words(text) or "".join(text.split())


def encode_pairs(pairs: list[Pair], tokenizer: Tokenizer, settings: EmbedConfig) -> EncodedPairs:
    """Return the ids of all texts."""
    queries = encode_texts([pair.query for pair in pairs], tokenizer, settings, settings.query_length)
    documents = [text for pair in pairs for text in (pair.positive, *pair.negatives)]
    documents = encode_texts(documents, tokenizer, settings, settings.document_length)
    first = np.cumsum([0, *(1 + len(pair.negatives) for pair in pairs)])
    return EncodedPairs(Texts(queries), Texts(documents), first)


def encode_texts(
    texts: list[str], tokenizer: Tokenizer, settings: EmbedConfig, length: int
) -> list[list[int]]:
    """Return each text as the model reads it, cut to `length` ids: for training, scoring and search alike."""
    room = max(0, length - len(tokenizer.framed([])))
    batch = tokenizer.encode_batch([read_as(text, settings) for text in texts])
    return [tokenizer.framed(ids[:room]) for ids in batch]


def read_as(text: str, settings: EmbedConfig) -> str:
    """Return a text in the form that the tokenizer gets."""
    return words(text) if settings.words else text


def text_key(ids: np.ndarray) -> int:
    """Return a number that identifies a text, of 63 bits."""
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big") >> 1
