"""Tokenizers against raw UTF-8 bytes and against a slow and obvious BPE."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import regex

from config.schema import TokenizerConfig
from inference.generation.text_stream import TextStream
from load_data.tokenization.tokenizer import (
    MASK,
    PART_TOKENS,
    SENTINELS,
    SPECIAL_TOKENS,
    UNKNOWN,
    BpeTokenizer,
    CharTokenizer,
    Tokenizer,
    byte_characters,
)
from load_data.tokenization.train_tokenizer import learn_characters, learn_merges
from utils.errors import UserError

ODD_TEXTS = [
    "",
    " ",
    "\n\n\t  \r\n \x0b\x0c",
    "".join(map(chr, range(256))),
    "\0\x1b[0m\x7f",
    "你好，世界。User：你是谁？\nAssistant：我是一个模型。",
    "emoji 🙂👩‍👩‍👧 e\u0301 \u200f\u2028\ufeff\U0010ffff",
    "½ ² ٣ 一二三 1234567890 3.14 0x1F",
    "def f(x):\n    if x:\n        return x\n\n\nclass A:\n\tpass\n",
    "-" * 500 + " " * 500 + "\n" * 500,
    " ".join(SPECIAL_TOKENS) + "".join(SPECIAL_TOKENS),
]


def random_texts(count):
    """Texts of random characters from all over Unicode."""
    rng = random.Random(0)
    alphabet = [chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000] + list("ab 01\n\t") * 500
    return ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(count)]


def slow_bpe(tokenizer, text):
    """Ids by the definition: in each piece, apply the earliest learned merge that fits, until none does."""
    names = byte_characters()
    rank = {pair: number for number, pair in enumerate(tokenizer.merges)}
    id_of = {part: one for one, part in enumerate(tokenizer.id_to_bytes)}
    ids = []
    for piece in regex.findall(tokenizer.contents["pattern"], text):
        parts = [names[byte] for byte in piece.encode("utf-8")]
        while pairs := [pair for pair in pairwise(parts) if pair in rank]:
            best = min(pairs, key=rank.get)
            at = list(pairwise(parts)).index(best)
            parts[at : at + 2] = ["".join(best)]
        ids += [id_of[bytes(names.index(letter) for letter in part)] for part in parts]
    return ids


def test_bpe_gives_back_every_text_and_counts_its_bytes(bpe):
    for text in ODD_TEXTS + random_texts(300):
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert bpe.token_bytes[ids].sum() == len(text.encode("utf-8"))
        assert b"".join(bpe.id_to_bytes[one] for one in ids) == text.encode("utf-8")


def test_bpe_equals_the_slow_definition(bpe, source_text):
    for text in [*ODD_TEXTS, source_text[:3000]]:
        assert bpe.encode(text) == slow_bpe(bpe, text)


def test_batch_equals_one_by_one(bpe):
    assert bpe.encode_batch(ODD_TEXTS) == [bpe.encode(text) for text in ODD_TEXTS]
    assert bpe.encode_batch([]) == []


def test_each_digit_is_one_token():
    """Also where training saw long numbers again and again."""
    bpe = learn_merges(TokenizerConfig(vocab_size=600), ["x = 2024 + 12\n  99 * 345 " * 100])
    digits = {str(digit): bpe.encode(str(digit)) for digit in range(10)}
    assert all(len(ids) == 1 for ids in digits.values())
    for text in ("2024", "12 + 7 == 19", "x1y22", "(345)", "\n  99"):
        ids = bpe.encode(text)
        for letter in filter(str.isdigit, text):
            ids.remove(digits[letter][0])
        assert not any(character.isdigit() for character in bpe.decode(ids))


def test_break_and_indentation_are_one_token(bpe):
    assert len(bpe.encode("\n        ")) == 1
    assert bpe.decode([bpe.encode("if x:\n        y")[-2]]) == ":\n        "


def test_special_tokens_take_the_first_and_the_last_ids(bpe):
    expected = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "User：", "Assistant：", "System：", "<|pad|>"]
    parts = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    assert list(bpe.special_ids) == expected + parts
    assert list(bpe.special_ids.values()) == [*range(7), *range(bpe.vocab_size - 6, bpe.vocab_size)]
    assert (bpe.eos_id, bpe.pad_id) == (0, 6)
    assert not bpe.token_bytes[:7].any() and not bpe.token_bytes[-6:].any()
    assert bpe.token_bytes[7:-6].min() == 1
    char = CharTokenizer("ab")
    assert char.special_ids == dict(zip([*expected, UNKNOWN, *parts], [*range(8), *range(10, 16)]))


def test_a_tokenizer_from_before_part_tokens_is_what_it_was(bpe):
    """Its file has no entry for them: the same ids for all text, and the same digest when written again."""
    for tokenizer in (bpe, CharTokenizer("\n aé你🙂")):
        old_file = json.loads(tokenizer.to_json())
        assert old_file.pop("parts") == list(PART_TOKENS)
        old = Tokenizer.from_json(json.dumps(old_file, ensure_ascii=False))
        assert json.loads(old.to_json()) == old_file and old.vocab_size == tokenizer.vocab_size - 6
        assert old.special_ids == {name: one for name, one in tokenizer.special_ids.items()
                                   if name not in PART_TOKENS}  # fmt: skip
        for text in (*ODD_TEXTS, "".join(PART_TOKENS)):
            assert old.encode(text) == tokenizer.encode(text) and old.digest != tokenizer.digest


def test_more_special_tokens_take_ids_of_their_own(bpe, source_text):
    more = bpe.with_special((MASK, *SENTINELS[:3]))
    first = bpe.vocab_size
    assert [more.special_ids[name] for name in (MASK, *SENTINELS[:3])] == [first + n for n in range(4)]
    assert more.vocab_size == first + 4 and bpe.vocab_size == first and MASK not in bpe.special_ids
    assert more.encode(source_text + MASK) == bpe.encode(source_text + MASK)
    assert more.decode([first, first + 1], skip_special=False) == MASK + SENTINELS[0]
    again = Tokenizer.from_json(more.to_json())
    assert again.special_ids == more.special_ids and again.digest == more.digest != bpe.digest
    assert more.with_special((MASK,)) is more
    assert more.framed([5, 6]) == [more.eos_id, 5, 6]


def test_no_text_makes_a_special_id():
    """Not even where training saw the markers a thousand times."""
    markers = "".join(SPECIAL_TOKENS + PART_TOKENS)
    for learn in (learn_merges, learn_characters):
        tokenizer = learn(TokenizerConfig(vocab_size=400), [markers * 1000])
        specials = set(tokenizer.special_ids.values())
        for text in [markers, *SPECIAL_TOKENS, *PART_TOKENS, f"hi<|im_end|>\nUser：{markers}"]:
            assert not specials & set(tokenizer.encode(text)) - {tokenizer.special_ids.get(UNKNOWN)}
        assert tokenizer.decode(tokenizer.encode(markers)) == markers


def test_special_tokens_are_left_out_or_spelled_out(bpe):
    ids = [bpe.special_ids["User："], *bpe.encode("hi"), bpe.special_ids["<|im_end|>"]]
    assert bpe.decode(ids) == "hi"
    assert bpe.decode(ids, skip_special=False) == "User：hi<|im_end|>"


def test_decode_takes_arrays(bpe):
    assert bpe.decode(np.array(bpe.encode("hello"), dtype=np.uint16)) == "hello"


def test_half_a_surrogate_pair_is_read_as_the_replacement_character(bpe):
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"


def test_stream_gives_whole_characters_only(bpe):
    for text in ODD_TEXTS + random_texts(100):
        stream = TextStream(bpe)
        parts = [stream.push(one) for one in bpe.encode(text)]
        assert "".join(parts) + stream.finish() == text
        assert "\ufffd" not in "".join(parts)
    stream = TextStream(bpe)
    first, *rest = bpe.encode("世")
    assert rest and stream.push(first) == "" and stream.push(bpe.eos_id) == ""
    assert stream.finish() == "\ufffd"


def test_stream_equals_decode_for_any_ids(bpe):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(bpe.vocab_size) for _ in range(20)]
        stream = TextStream(bpe)
        assert "".join(map(stream.push, ids)) + stream.finish() == bpe.decode(ids)


def test_char_gives_one_id_per_character():
    tokenizer = CharTokenizer("\n aé你")
    assert tokenizer.vocab_size == 8 + 5 + 6
    assert tokenizer.encode("你 a\n") == [12, 9, 10, 8]
    assert tokenizer.decode([12, 9, 10, 8]) == "你 a\n"
    assert tokenizer.encode("ab") == [10, tokenizer.special_ids[UNKNOWN]]
    assert tokenizer.token_bytes[8:-6].tolist() == [1, 1, 1, 2, 3]


def test_char_counts_the_bytes_of_what_it_does_not_know():
    """Unknown characters once vanished, and bits per byte with them (D20)."""
    tokenizer, text = CharTokenizer("abc"), "aéb😀c\ud800"
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8", "surrogatepass")) == 12
    assert ids.count(tokenizer.special_ids[UNKNOWN]) == 9
    assert tokenizer.decode(ids) == "a��b����c���" == "".join(map(TextStream(tokenizer).push, ids))


def test_json_keeps_everything(bpe, source_text):
    for tokenizer in (bpe, CharTokenizer("\0\n aé你🙂")):
        copy = Tokenizer.from_json(tokenizer.to_json())
        assert copy.kind == tokenizer.kind and copy.digest == tokenizer.digest
        assert copy.special_ids == tokenizer.special_ids and copy.id_to_bytes == tokenizer.id_to_bytes
        assert copy.encode(source_text) == tokenizer.encode(source_text)
    assert CharTokenizer("ab").digest != CharTokenizer("ac").digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "[]",
        "null",
        '{"kind": "words"}',
        '{"kind": "char"}',
        '{"kind": "char", "characters": "ba"}',
        '{"kind": "char", "characters": 5}',
        '{"kind": "bpe", "pattern": ".", "merges": ["a b c"]}',
        '{"kind": "bpe", "pattern": ".", "merges": ["ab c"]}',
        '{"kind": "bpe", "pattern": ".", "merges": [7]}',
        '{"kind": "bpe", "pattern": "(", "merges": []}',
        '{"kind": "bpe", "merges": []}',
    ],
)
def test_malformed_json_is_one_clear_error(text):
    with pytest.raises(UserError, match="^some.pkl: not a tokenizer that TinySeek wrote"):
        Tokenizer.from_json(text, where="some.pkl")


def test_bytes_have_distinct_visible_names():
    names = byte_characters()
    assert len(set(names)) == 256 and not any(name.isspace() or not name.isprintable() for name in names)
    assert names[ord("a")] == "a" and names[ord(" ")] == "Ġ" and names[ord("\n")] == "Ċ"  # as in GPT-2


def test_a_token_spelled_by_two_merges_has_one_id():
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    tokenizer = BpeTokenizer(merges)
    assert tokenizer.vocab_size == 7 + 256 + 3 + 6
    assert tokenizer.encode("abc") == [7 + 256 + 2]


def test_ids_beyond_the_vocabulary_stand_for_nothing():
    """A model's vocabulary may be padded above its tokenizer's; what it draws there has no text."""
    tokenizer = CharTokenizer("ab")
    ids = [*tokenizer.encode("ab"), tokenizer.vocab_size, tokenizer.vocab_size + 50]
    assert tokenizer.decode(ids) == "ab"
