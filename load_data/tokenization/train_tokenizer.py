"""Learning a tokenizer from text, once: the result is kept and found again.

The same text and settings give the same tokenizer, byte for byte, in every process.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from config.schema import TokenizerConfig
from load_data.tokenization.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    BpeTokenizer,
    CharTokenizer,
    Tokenizer,
    split_and_spell,
    without_surrogates,
)
from utils.errors import UserError


def train_tokenizer(
    config: TokenizerConfig, texts: Iterable[str], cache_dir: Path, key: str | None = None
) -> Tokenizer:
    """A tokenizer learned from `texts`, or the one kept in `cache_dir` from the last time.

    `key` identifies the texts without reading them; without it they are read and hashed. Raises `UserError`
    when there is no text.
    """
    if key is None:
        texts = list(texts)
        key = content_hash(texts)
    settings = {
        "char": (config.kind,),
        "bpe": (config.kind, config.vocab_size, config.train_bytes, SPLIT_PATTERN),
    }
    name = hashlib.sha256(repr((key, settings[config.kind])).encode("utf-8")).hexdigest()[:16]
    path = Path(cache_dir) / f"tokenizer_{name}.json"
    if path.is_file():
        return Tokenizer.from_json(path.read_text(encoding="utf-8"), where=f"{path} (delete it to retrain)")
    learn = {"char": learn_characters, "bpe": learn_merges}
    tokenizer = learn[config.kind](config, texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(tokenizer.to_json(), encoding="utf-8")
    partial.replace(path)  # a reader sees the whole file or none
    return tokenizer


def learn_merges(config: TokenizerConfig, texts: Iterable[str]) -> BpeTokenizer:
    """Byte-level BPE with `config.vocab_size` ids, or fewer where no more pairs occur twice."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = split_and_spell(SPLIT_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, met or not
        show_progress=False,
    )
    print(f"learning a tokenizer of {config.vocab_size} tokens ...", file=sys.stderr, flush=True)
    backend.train_from_iterator(first_bytes(texts, config.train_bytes), trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return BpeTokenizer([tuple(pair) for pair in merges])


def learn_characters(config: TokenizerConfig, texts: Iterable[str]) -> CharTokenizer:
    """One id for each distinct character of `texts`."""
    characters = set()
    for text in texts:
        characters.update(without_surrogates(text))
    if not characters:
        raise UserError("tokenizer.kind=char: there is no training text to take characters from")
    return CharTokenizer("".join(sorted(characters)))


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts up to `limit` UTF-8 bytes in all; the last one is cut at a whole character."""
    empty = True
    for text in texts:
        raw = without_surrogates(text).encode("utf-8")[:limit]
        limit -= len(raw)
        empty = empty and not raw
        yield raw.decode("utf-8", errors="ignore")
        if limit <= 0:
            break
    if empty:
        raise UserError("tokenizer.kind=bpe: there is no training text to learn merges from")


def content_hash(texts: Iterable[str]) -> str:
    """One hash for a sequence of texts; where one ends and the next begins counts too."""
    total = hashlib.sha256()
    for text in texts:
        raw = without_surrogates(text).encode("utf-8")
        total.update(len(raw).to_bytes(8, "little") + raw)
    return total.hexdigest()
