"""Train a tokenizer on text, once: the result is cached.

The same text and settings give the same tokenizer, byte for byte, in every process.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from config.schema import TokenizerConfig
from load_data.tokenization.base import PART_TOKENS, SPECIAL_TOKENS, Tokenizer, without_surrogates
from load_data.tokenization.hf_tokenizer import read_hf_tokenizer
from load_data.tokenization.tokenizer import SPLIT_PATTERN, BpeTokenizer, CharTokenizer, split_and_spell
from utils.errors import UserError

NO_TEXT = "after the split there is no training text; lower data.val_fraction, or give more text"
BLOCKS = 64  # samples, at least, from texts too long to be read whole


def train_tokenizer(
    config: TokenizerConfig, texts: Iterable[str], cache_dir: Path, key: str, size: int
) -> Tokenizer:
    """Return a tokenizer trained on `texts`, the one cached in `cache_dir`, or the one that `config` names.
    `key` identifies the texts, and `size` is roughly their bytes. Raises `UserError` if there is no text."""
    if config.kind == "hf":
        return read_hf_tokenizer(config.path)
    settings = [config.kind, PART_TOKENS]
    if config.kind == "bpe":
        settings += [config.vocab_size, config.train_bytes, SPLIT_PATTERN]
    name = hashlib.sha256(repr((key, settings)).encode("utf-8")).hexdigest()[:16]
    path = Path(cache_dir) / f"tokenizer_{name}.json"
    if path.is_file():
        return Tokenizer.from_json(path.read_text(encoding="utf-8"), where=f"{path} (delete it to retrain)")
    train = {"char": learn_characters, "bpe": learn_merges}
    tokenizer = train[config.kind](config, texts, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(tokenizer.to_json(), encoding="utf-8")
    partial.replace(path)  # atomic: a reader sees the whole file or none
    return tokenizer


def learn_merges(config: TokenizerConfig, texts: Iterable[str], size: int = 0) -> BpeTokenizer:
    """Return byte-level BPE with `config.vocab_size` ids, or fewer if no more pairs occur twice, trained on
    at most `config.train_bytes` of `texts`, which have about `size` bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = split_and_spell(SPLIT_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(SPECIAL_TOKENS) - len(PART_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, whether they occur or not
        show_progress=False,
    )
    print(f"training a tokenizer of {config.vocab_size} tokens ...", file=sys.stderr, flush=True)
    backend.train_from_iterator(sampled(texts, config.train_bytes, size), trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return BpeTokenizer([tuple(pair) for pair in merges])


def learn_characters(config: TokenizerConfig, texts: Iterable[str], size: int = 0) -> CharTokenizer:
    """Return a tokenizer with one id for each distinct character of `texts`."""
    characters = set()
    for text in texts:
        characters.update(without_surrogates(text))
    if not characters:
        raise UserError(NO_TEXT)
    return CharTokenizer("".join(sorted(characters)))


def sampled(texts: Iterable[str], limit: int, size: int) -> Iterator[str]:
    """Yield at most `limit` UTF-8 bytes of `texts`, which have about `size`: all of them if they fit,
    otherwise blocks spread evenly, so that the last language in a folder is seen like the first."""
    share, block, seen, taken = min(1.0, limit / max(size, 1)), limit // BLOCKS, 0, 0
    for text in texts:
        raw = without_surrogates(text).encode("utf-8")
        seen += len(raw)
        due = min(limit, math.ceil(share * seen)) - taken
        if due >= min(len(raw), block, limit - taken):
            taken += len(raw := raw[:due])
            yield raw.decode("utf-8", errors="ignore")
        if taken >= limit:
            break
    if not taken:
        raise UserError(NO_TEXT)
