"""Kinds of tokens against expectations written by hand, and against Python's own tokenizer."""

import io
import keyword
import tokenize

import pytest

from load_data.tokenization.token_kinds import KINDS, token_kinds
from load_data.tokenization.tokenizer import (
    SPECIAL_TOKENS,
    UNKNOWN,
    BpeTokenizer,
    CharTokenizer,
    byte_characters,
)

EXPECTED = {
    "white space": ["    ", "\n", "\n        ", " ", "\t", "\r\n\r\n", "\u3000"],
    "keyword": ["def", " return", "None", " not", "(not", "[None", " in", "import"],
    "name piece": ["self", ".append", "ing", "_init", "__", "_if", ".is", '"the', "#no", "é"],
    "spaced word": [" the", " x", " self", " _", " Zürich", " definition", " False_"],
    "number": ["7", "0", "½", " 3", "-1", "1e9", "２", "½x"],
    "sign": [" =", "):\n    ", "#", '"""', "'", "->", " +=", "(_", "，", "・", "€", "`", "^", ":\n"],
    "CJK": ["你好", "。世", "の", "カ", "한", " 中", "一", "abc中"],
    "other": ["🙂", "\x00", " ☃", "\u0301", "(🙂"],
}
CASES = [(kind, text) for kind, texts in EXPECTED.items() for text in texts]


def spelled(text: str) -> str:
    """`text` in the letters that stand for its bytes."""
    return "".join(byte_characters()[byte] for byte in text.encode("utf-8"))


def tokenizer_with(texts) -> BpeTokenizer:
    """A tokenizer that has each of `texts` as a token, merged byte by byte."""
    merges = []
    for letters in map(spelled, texts):
        merges += [(letters[:end], letters[end]) for end in range(1, len(letters))]
    return BpeTokenizer(list(dict.fromkeys(merges)))


@pytest.fixture(scope="module")
def kind_of_bytes():
    """Kind of each token of a tokenizer that knows all texts above, by its bytes."""
    tokenizer = tokenizer_with([text for _, text in CASES])
    names, kinds = token_kinds(tokenizer)
    return {part: names[kind] for part, kind in zip(tokenizer.id_to_bytes, kinds, strict=True)}


@pytest.mark.parametrize("kind, text", CASES)
def test_kinds_are_those_that_a_reader_would_say(kind, text, kind_of_bytes):
    assert kind_of_bytes[text.encode("utf-8")] == kind


@pytest.mark.parametrize("part", [b"\xe4", b"\xe4\xbd", b"\xf0\x9f\x99", b"\x80", b"\xff", b" Z\xc3"])
def test_parts_of_a_character_are_other(part, kind_of_bytes):
    assert kind_of_bytes[part] == "other"


def test_every_id_has_a_kind_and_special_tokens_are_other(bpe):
    names, kinds = token_kinds(bpe)
    assert names == KINDS
    assert len(names) <= 8
    assert kinds.shape == (bpe.vocab_size,)
    assert set(kinds.tolist()) <= set(range(len(names)))
    assert {names[kinds[one]] for one in bpe.special_ids.values()} == {"other"}
    learned = {names[kind] for kind in kinds[len(SPECIAL_TOKENS) + 256 : -6]}
    assert learned >= {"white space", "keyword", "name piece", "spaced word", "sign"}


def test_characters_have_kinds_too():
    tokenizer = CharTokenizer("".join(sorted("\n a_7+#'你，é🙂")))
    names, kinds = token_kinds(tokenizer)
    found = {letter: names[kinds[tokenizer.ids_of[letter][0]]] for letter in tokenizer.ids_of}
    assert found == {
        "\n": "white space", " ": "white space", "a": "name piece", "_": "name piece", "é": "name piece",
        "7": "number", "+": "sign", "#": "sign", "'": "sign", "，": "sign", "你": "CJK", "🙂": "other",
    }  # fmt: skip
    assert names[kinds[tokenizer.special_ids[UNKNOWN]]] == "other"
    assert names[kinds[tokenizer.eos_id]] == "other"


def test_kinds_agree_with_the_tokenizer_of_python(bpe, source_text):
    """Each token of real source, encoded alone: operators are signs, names pieces of names."""
    names, kinds = token_kinds(bpe)
    seen = {tokenize.OP: set(), tokenize.NUMBER: set(), tokenize.NAME: set(), "keyword": set()}
    for token in tokenize.generate_tokens(io.StringIO(source_text).readline):
        is_decimal = token.type == tokenize.NUMBER and token.string.isdecimal()
        if token.type not in (tokenize.OP, tokenize.NAME) and not is_decimal:
            continue
        ids = bpe.encode(token.string)
        group = token.type
        if keyword.iskeyword(token.string) and len(ids) == 1:
            group = "keyword"
        seen[group] |= {names[kinds[one]] for one in ids}
    assert seen[tokenize.OP] == {"sign"}
    assert seen["keyword"] == {"keyword"}
    assert seen[tokenize.NUMBER] == {"number"}
    assert seen[tokenize.NAME] <= {"name piece", "keyword", "number"}  # `in` is a piece of `int`
