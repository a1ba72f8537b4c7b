"""The byte-pair encoder by hand equals the `tokenizers` library: merges, ids, ties."""

import inspect
import random
import textwrap
from pathlib import Path

import pytest

from config.schema import TokenizerConfig
from load_data import byte_pair
from load_data.tokenization.tokenizer import BpeTokenizer
from load_data.tokenization.train_tokenizer import learn_merges

SHAKESPEARE = Path(__file__).resolve().parents[3] / "shared/data/tinyshakespeare.txt"


def texts():
    """Texts of many kinds, and how many ids to train on each."""
    rng = random.Random(0)
    words = ["".join(rng.choices("ab", k=rng.randrange(1, 9))) for _ in range(60)]
    yield "ties", " ".join(words), 400  # few letters: almost every count has a tie
    yield "repetition", "a" * 50 + " aaa" * 7 + " ababab abab bab", 300
    yield "languages", "你好，世界。你好吗？ Grüße 🙂🙂 naïve\r\n\t x = 12 + 7\n\n" * 3, 330
    yield "once", "abc", 300
    yield "empty", "", 300


@pytest.mark.parametrize(("text", "size"), [one[1:] for one in texts()], ids=[one[0] for one in texts()])
def test_merges_and_ids_equal_the_library(text, size):
    compare(text, size)


def test_real_source_equals_the_library(source_text):
    compare(source_text, 1000)


def test_real_prose_equals_the_library():
    if not SHAKESPEARE.is_file():
        pytest.skip(f"{SHAKESPEARE} is not there")
    compare(SHAKESPEARE.read_text(encoding="utf-8")[:50_000], 800)


def compare(text, size):
    """Train both on `text`, then encode it and something else with both."""
    merges = byte_pair.train(text, size)
    library = learn_merges(TokenizerConfig(vocab_size=size), [text]) if text else BpeTokenizer([])
    assert merges == library.merges and len(byte_pair.vocabulary(merges)) == library.vocab_size - 13
    for other in (text[:20_000], "Other words: 你好 🙂 \0 \t\n  x += 1", inspect.getsource(textwrap.dedent)):
        assert byte_pair.encode(other, merges) == library.encode(other)


def test_a_token_with_two_merges_is_encoded_like_the_library():
    """The lowest rank first, then the leftmost, one at a time: ("abc", "a") comes between two ("a", "bc")."""
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("abc", "a"), ("a", "bc"), ("abca", "bc")]
    library = BpeTokenizer(merges)
    for text in ("abcabc", "aabcabcab", "abcabcabca", "bcabca"):
        assert byte_pair.encode(text, merges) == library.encode(text)


def test_the_lesson_runs(capsys):
    byte_pair.lesson()
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) < 30 and max(map(len, lines)) <= 120
