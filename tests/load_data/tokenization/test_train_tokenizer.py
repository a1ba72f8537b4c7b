"""Learning tokenizers: the same every time, kept and found again."""

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from config.schema import TokenizerConfig
from load_data.tokenization import train_tokenizer as module
from load_data.tokenization.tokenizer import SPLIT_PATTERN
from load_data.tokenization.train_tokenizer import learn_merges, sampled, train_tokenizer
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_first_merge_is_the_most_frequent_pair(source_text):
    pairs = Counter()
    for piece in regex.findall(SPLIT_PATTERN, source_text):
        pairs.update(pairwise(piece))
    left, right = learn_merges(TokenizerConfig(vocab_size=300), [source_text]).merges[0]
    assert (left.replace("Ġ", " "), right.replace("Ġ", " ")) == pairs.most_common(1)[0][0]


def test_vocabulary_size_is_a_limit(source_text):
    assert learn_merges(TokenizerConfig(vocab_size=500), [source_text]).vocab_size == 500
    assert learn_merges(TokenizerConfig(vocab_size=500), ["abc"]).vocab_size == 7 + 256 + 6


def test_fresh_processes_learn_the_same_tokenizer():
    code = (
        "import json.decoder, inspect; from config.schema import TokenizerConfig;"
        "from load_data.tokenization.train_tokenizer import learn_merges;"
        "print(learn_merges(TokenizerConfig(vocab_size=500), [inspect.getsource(json.decoder)]).to_json())"
    )
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        settings = {"cwd": REPOSITORY, "env": environment, "capture_output": True}
        outputs.add(subprocess.run([sys.executable, "-c", code], check=True, **settings).stdout)
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_second_call_finds_the_first_result(kind, tmp_path, monkeypatch):
    config = TokenizerConfig(kind=kind, vocab_size=300)
    first = train_tokenizer(config, ["some text, some text"], tmp_path, "a name", 20)
    assert [path.name.startswith("tokenizer_") for path in tmp_path.iterdir()] == [True]
    monkeypatch.setattr(module, "learn_merges", None)  # neither may be called
    monkeypatch.setattr(module, "learn_characters", None)

    def unread():
        pytest.fail("the text was read")
        yield

    assert train_tokenizer(config, unread(), tmp_path, "a name", 20).digest == first.digest


def test_other_text_or_settings_learn_anew(tmp_path):
    texts = ["aaaa bbbb aaaa bbbb"]
    train_tokenizer(TokenizerConfig(vocab_size=300), texts, tmp_path, "one", 20)
    train_tokenizer(TokenizerConfig(vocab_size=301), texts, tmp_path, "one", 20)
    train_tokenizer(TokenizerConfig(vocab_size=300, train_bytes=5), texts, tmp_path, "one", 20)
    train_tokenizer(TokenizerConfig(vocab_size=300, kind="char"), texts, tmp_path, "one", 20)
    train_tokenizer(TokenizerConfig(vocab_size=300), texts, tmp_path, "two", 20)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_broken_cache_file_is_named(tmp_path):
    config = TokenizerConfig(kind="char")
    train_tokenizer(config, ["abc"], tmp_path, "one", 3)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path.name} .delete it"):
        train_tokenizer(config, ["abc"], tmp_path, "one", 3)


def test_training_reads_no_more_than_its_limit():
    assert list(sampled(["abc", "defg", "h"], 5, 5)) == ["abc", "de"]
    assert list(sampled(["你好"], 5, 5)) == ["你"]
    assert "".join(sampled(["a"] * 10, 100, 10)) == "a" * 10


def test_a_tokenizer_sees_every_file_not_only_the_first(tmp_path):
    """Of 90 + 10 kB in two languages, a sample of 20 kB has both, in about these shares (D21)."""
    for texts in (["abc" * 30_000, "xyz" * 3_333], ["abc" * 30] * 1000 + ["xyz" * 30] * 111):
        size = sum(map(len, texts))
        text = "".join(sampled(texts, 20_000, size))
        assert 18_000 < len(text) <= 20_000 and 1_500 < sum(map(text.count, "xyz")) < 2_500
    config = TokenizerConfig(vocab_size=300, train_bytes=1000)
    merges = train_tokenizer(config, ["abc " * 5_000, "xyz " * 5_000], tmp_path, "one", 40_000).merges
    assert {"Ġabc", "Ġxyz"} <= {"".join(pair) for pair in merges}


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error(kind, texts, tmp_path):
    with pytest.raises(UserError, match="no training text"):
        train_tokenizer(TokenizerConfig(kind=kind), texts, tmp_path, "one", 0)
    assert not list(tmp_path.iterdir())
