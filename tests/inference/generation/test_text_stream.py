"""Streamed text against the whole text, cut before the stop string that is complete first."""

import random

import pytest

from inference.generation.text_stream import AnswerStream, TextStream
from tests.inference.tools import byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(ids, stop=()):
    """The pieces that are shown for `ids`, and whether the stream stopped."""
    text = TextStream(TOKENIZER, stop)
    pieces = [text.push(one) for one in ids]
    return [*pieces, text.finish()], text.stopped


def test_characters_are_never_broken():
    text = "naïve 中文 😀 e\u0301"
    pieces, stopped = stream(TOKENIZER.encode(text))
    assert "".join(pieces) == text and not stopped and "\ufffd" not in "".join(pieces)
    assert pieces[text.encode().index("中".encode()) + 2] == "中"  # at its third byte, not later
    assert "".join(stream(TOKENIZER.encode("中")[:2])[0]) == "\ufffd"  # cut off by the end


def test_special_and_unknown_ids_are_silent():
    ids = [TOKENIZER.eos_id, *TOKENIZER.encode("a"), TOKENIZER.vocab_size, TOKENIZER.vocab_size + 50]
    assert "".join(stream(ids)[0]) == "a"


def test_thinking_that_nobody_asked_for():
    """At the beginning of an answer it is no part of it; later a stray token is silent."""
    think, done = (TOKENIZER.special_ids[name] for name in ("<think>", "</think>"))
    for ids, pieces in (
        ([think, *TOKENIZER.encode("ab"), done, *TOKENIZER.encode("c")], {"thinking": "ab", "content": "c"}),
        ([*TOKENIZER.encode("a"), think, *TOKENIZER.encode("b"), done], {"content": "ab"}),
    ):
        stream, shown = AnswerStream(TOKENIZER), {}
        for part, text in [*map(stream.push, ids), stream.finish()]:
            shown[part] = shown.get(part, "") + text
        assert {part: text for part, text in shown.items() if text} == pieces
        assert stream.message() == {"role": "assistant", "content": pieces["content"]}


@pytest.mark.parametrize(
    "text, stop, shown",
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo", ("\n\n",), "one\ntwo"),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd",), "abc"),
        ("stop", ("stop",), ""),
        ("sto", ("stop",), "sto"),  # the end decides: it was none
        ("x END y", ("y", "END"), "x "),  # whichever is complete first
        ("中文。然后", ("。",), "中文"),
        ("text", ("",), "text"),  # an empty stop string stops nothing
    ],
)
def test_stop_strings(text, stop, shown):
    pieces, stopped = stream(TOKENIZER.encode(text), stop)
    assert "".join(pieces) == shown and stopped == (shown != text)


def test_any_text_any_stop():
    """Nothing of a stop string is ever shown, and nothing else is held back longer than needed."""
    chance = random.Random(0)
    for _ in range(500):
        text = "".join(chance.choices("ab中", k=chance.randrange(1, 14)))
        stop = tuple("".join(chance.choices("ab中", k=chance.randrange(1, 4))) for _ in range(2))
        pieces, stopped = stream(TOKENIZER.encode(text), stop)
        places = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
        assert "".join(pieces) == (text[: min(places)[1]] if places else text)
        assert stopped == bool(places)
        waiting = TextStream(TOKENIZER, stop)
        shown = "".join(map(waiting.push, TOKENIZER.encode(text)))
        if not places:
            rest = text[len(shown) :]
            assert not rest or any(one.startswith(rest) for one in stop)
