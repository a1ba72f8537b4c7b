"""Readers: what they read, how little they hold, and what they say about files that cannot be read."""

import json
import tracemalloc

import pytest

from config.schema import RunConfig
from load_data.corpora import documents as module
from load_data.chat.chat_data import prepare_chat
from load_data.corpora.documents import find_files, read_documents, read_pieces, read_records
from load_data.chat.records import as_messages, as_text
from load_data.corpora.sources import Sources
from load_data.tokenization.tokenizer import BpeTokenizer
from utils.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHAT_FORMS = [
    {"conversations": CHAT},
    {"messages": CHAT},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
]


def texts(path):
    """The text of each document of a file."""
    return ["".join(document.pieces) for document in read_documents(path)]


def test_a_txt_file_is_one_document(write):
    assert texts(write("a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]
    assert texts(write("b.TXT", "\ufeffmarked\r\nby Windows")) == ["marked\nby Windows"]


def test_a_jsonl_file_is_a_document_per_record(write):
    lines = [
        '{"text": "one\\ntwo"}',
        "",
        "  ",
        '{"text": "\u2028 three"}',
        '{"text": "  "}',
        '{"text": "four"}',
    ]
    path = write("a.jsonl", "\n".join(lines))
    assert texts(path) == ["one\ntwo", "\u2028 three", "four"]


@pytest.mark.parametrize("record", CHAT_FORMS)
def test_chat_forms_mean_the_same(record):
    assert as_messages(record, "here") == CHAT
    assert as_text(record, "here") == "Hi\nHello"


def test_details_of_forms():
    assert as_messages({"instruction": "Add", "input": "1 2", "output": "3"}, "")[0]["content"] == "Add\n1 2"
    system = [{"role": "system", "content": "Be brief"}, *CHAT]
    assert as_messages({"messages": [{**message, "weight": 1} for message in system]}, "") == system
    assert as_text({"text": "plain", "source": "somewhere"}, "") == "plain"


def test_equal_texts_have_equal_identities(write):
    one, two = write("a.txt", "same"), write("b/c.txt", "same")
    assert [d.identity for d in read_documents(one)] == [d.identity for d in read_documents(two)]
    records = list(read_documents(write("a.jsonl", [{"text": "x"}, {"text": "y"}, {"text": "x"}])))
    assert records[0].identity == records[2].identity != records[1].identity


def test_folders_are_searched_in_order(write, tmp_path):
    names = ["b.txt", "a/z.jsonl", "a/b/c.txt", "c.jsonl"]
    for name in [*names, "ignored.md", "a/ignored.py"]:
        write(name, '{"text": "x"}')
    write("empty.txt", "")
    found = [file.relative_to(tmp_path).as_posix() for file in find_files([str(tmp_path)])]
    assert found == ["a/b/c.txt", "a/z.jsonl", "b.txt", "c.jsonl"]


def test_a_large_file_comes_in_pieces_that_end_with_a_line(write, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    text = "".join(f"line number {number} 你好\n" for number in range(1000)) + "x" * 1000 + "\nend"
    pieces = list(read_pieces(write("a.txt", text)))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 200
    assert all(piece.endswith("\n") for piece in pieces if "x" not in piece and piece != pieces[-1])


def test_reading_holds_a_piece_not_the_file(write):
    path = write("a.txt", "some words on a line\n" * 1_500_000)  # 31 MB
    tracemalloc.start()
    total = sum(map(len, read_pieces(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 31_500_000 and peak < 8_000_000


def test_reading_a_jsonl_stops_where_the_reader_stops(write):
    path = write("a.jsonl", '{"text": "good"}\n' * 3 + "broken")
    documents = read_documents(path)
    assert [next(documents).pieces for _ in range(3)] == [("good",)] * 3
    with pytest.raises(UserError, match="line 4"):
        next(documents)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, r"missing.txt: no such file or folder; the word python"),
        ("empty.txt", "", r"empty.txt: the file is empty; put text into it"),
        ("empty.jsonl", "", r"empty.jsonl: the file is empty"),
        ("picture.png", b"\x89PNG", r"picture.png: .txt and .jsonl files are read; convert"),
        ("nothing", "text", r"nothing: .txt and .jsonl files are read"),
        ("folder/a.md", "text", r"folder: no file with text in this folder; .txt and .jsonl"),
    ],
)
def test_paths_that_give_nothing(write, tmp_path, name, content, message):
    if content is not None:
        write(name, content)
    with pytest.raises(UserError, match=message) as error:
        find_files([str(tmp_path / name.split("/")[0])])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"one\ntwo\0\n", r"a.txt, line 2: a NUL byte: this is a binary file"),
        ("a.txt", b"one\ntwo\nth\xffree\n", r"a.txt, line 3: not UTF-8 text; convert the file to UTF-8"),
        ("a.txt", "grün".encode("latin-1"), r"a.txt, line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a.jsonl, line 3: not valid JSON .*whole JSON object"),
        ("a.jsonl", '{"text": "x"}\n\0\n', r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl, line 1: not valid JSON .*nested too deeply"),
        ("a.jsonl", "1" * 5000, r"a.jsonl, line 1: (not valid JSON|each line must hold one JSON object)"),
        ("a.jsonl", "[1]", r"a.jsonl, line 1: each line must hold one JSON object, not a list"),
        ("a.jsonl", '{"txt": 1, "b": 2}', r"line 1: .*\(its keys: txt, b\); known forms: \{\"text\"\}"),
        ("a.jsonl", "{}", r"line 1: a record of unknown form \(its keys: none\)"),
        ("a.jsonl", '{"text": null}', r"line 1: text must be a text, not None"),
        ("a.jsonl", '{"messages": []}', r"line 1: messages must be a list of at least one message"),
        ("a.jsonl", '{"messages": "hi"}', r"messages must be a list of at least one message, not 'hi'"),
        ("a.jsonl", '{"conversations": ["hi"]}', r"line 1: message 1 of conversations must be"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1: message 1 of messages must be"),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": "x"}]}', r"role 'bot'; known roles: system"),
        ("a.jsonl", '{"messages": [{"role": [], "content": "x"}]}', r"role \[\]; known roles"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 5}]}', r"of messages: content must be a text"),
        ("a.jsonl", '{"instruction": 1, "output": "x"}', r"line 1: instruction must be a text, not 1"),
        ("a.jsonl", '{"prompt": "a", "chosen": {}, "rejected": "b"}', r"chosen must be a text, not {}"),
    ],
)
def test_content_that_cannot_be_read(write, name, content, message):
    path = write(name, content)
    with pytest.raises(UserError, match=message) as error:
        texts(path)
    assert str(error.value).startswith(f"{path}, line ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_nul_and_bad_bytes_are_found_beyond_the_first_piece(write, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 64)
    with pytest.raises(UserError, match="line 501: a NUL"):
        list(read_pieces(write("a.txt", b"some line\n" * 500 + b"a\0b")))
    with pytest.raises(UserError, match="line 501: not UTF-8"):
        list(read_pieces(write("a.txt", b"some line\n" * 500 + b"a\xff\xfeb")))


def test_plain_text_is_no_conversation():
    with pytest.raises(UserError, match="^f.jsonl, line 9: .*its keys: text"):
        as_messages({"text": "plain"}, "f.jsonl, line 9")


def test_records_say_where_they_stand(write):
    path = write("a.jsonl", '\n{"text": "x"}\n\n{"text": "y"}\n')
    assert [where for _, where in read_records(path)] == [f"{path}, line 2", f"{path}, line 4"]


def test_pre_training_and_chat_put_a_question_on_the_same_side(tmp_path):
    """Else the text of pre-training would hold the answers that a later stage is scored on."""
    path = tmp_path / "a.jsonl"
    records = [[("user", f"q {n // 2}"), ("assistant", f"a {n}")] for n in range(60)]
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            messages = [{"role": role, "content": content} for role, content in record]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = RunConfig()
    config.data.paths, config.data.val_fraction = [str(path)], 0.3
    pieces = list(Sources(config.data).all_documents())
    chat = prepare_chat(config, BpeTokenizer([]))
    answers = {"".join(text).split("\n")[1] for side, text in pieces if side == "val"}
    assert answers == {messages[1]["content"] for messages in chat.val_dialogues} and 4 < len(answers) < 40
