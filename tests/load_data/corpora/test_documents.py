"""Readers: content, memory, and errors for files that cannot be read."""

import json
import tracemalloc
from hashlib import sha256
from itertools import pairwise

import pytest

from config.load import from_dict, load_config, to_dict
from config.schema import RunConfig
from load_data.corpora import documents as module
from load_data.chat.chat_data import prepare_chat
from load_data.corpora.documents import as_document, find_files, read_pieces, read_records
from load_data.corpora.documents import skipped_lines
from load_data.chat.records import as_messages, as_text, message, question_key, scored_answers, split_key
from load_data.corpora.reserved import unit_hash
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


def texts(path, skipped=None):
    """Return the text of each document of a file."""
    if path.suffix.lower() == ".txt":
        return ["".join(read_pieces(path))]
    documents = read_records(path, as_document, [] if skipped is None else skipped)
    return [text for _, text in documents]


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
    assert as_messages({"messages": [{**one, "weight": 1} for one in system]}, "") == system
    assert as_text({"text": "plain", "source": "somewhere"}, "") == "plain"


def test_equal_texts_have_equal_identities():
    records = [as_document({"text": text}, "") for text in "xyx"]
    assert records[0] == records[2] and records[0][0] != records[1][0]


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
    skipped = []
    documents = read_records(path, as_document, skipped)
    assert [next(documents)[1] for _ in range(3)] == ["good"] * 3 and skipped == []
    assert list(documents) == [] and [f"{path}, line 4: not valid JSON" in one for one in skipped] == [True]


def test_bad_records_are_skipped_and_reported(write):
    """One line of thousands must not stop a run; a file of nothing else must (D5)."""
    bad = ['{"txt": 1}', "broken", '{"messages": []}', '{"text": 5}']
    path = write("a.jsonl", "\n".join([*bad, '{"text": "good"}', '{"text": " "}']))
    skipped = []
    assert texts(path, skipped) == ["good"] and len(skipped) == 4
    lines = skipped_lines(skipped)
    assert lines[0] == "skipped records: 4" and lines[-1] == "  ... and 1 more"
    assert lines[2].startswith(f"  {path}, line 2: not valid JSON") and skipped_lines([]) == []
    with pytest.raises(UserError, match=r"line 1: .*its keys: txt.*none of the 4 records is usable"):
        texts(write("b.jsonl", "\n".join(bad)))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, r"missing.txt: no such file or folder; built in are python"),
        ("empty.txt", "", r"empty.txt: nothing to read; .txt and .jsonl files with text"),
        ("empty.jsonl", "", r"empty.jsonl: nothing to read"),
        ("picture.png", b"\x89PNG", r"picture.png: nothing to read; .txt and .jsonl files .*: convert"),
        ("nothing", "text", r"nothing: nothing to read; .txt and .jsonl"),
        ("folder/a.md", "text", r"folder: nothing to read; .txt and .jsonl"),
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
        ("a.jsonl", '\n\n{"text": \n', r"a.jsonl, line 3: not valid JSON .*whole JSON object"),
        ("a.jsonl", "\n\0\n", r"a.jsonl, line 2: not valid JSON"),
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
    places = read_records(path, lambda record, where: where, [])
    assert list(places) == [f"{path}, line 2", f"{path}, line 4"]


def test_preferences_and_other_dialects():
    """UltraFeedback repeats the prompt in `chosen`; ShareGPT says `from` and `value` (D5)."""
    prompt, answer = CHAT
    assert as_messages({"prompt": "Hi", "chosen": CHAT, "rejected": CHAT}, "") == CHAT
    assert as_text({"prompt": [prompt], "chosen": CHAT, "rejected": CHAT}, "") == "Hi\nHello"
    assert as_messages({"prompt": "Hi", "chosen": "Hi Hi", "rejected": "-"}, "")[1]["content"] == "Hi Hi"
    names = [("developer", "S"), ("human", "Hi"), ("gpt", "Hello"), ("tool", "7"), ("model", "Seven")]
    roles = ("system", "user", "assistant", "user", "assistant")
    expected = [(role, content) for role, (_, content) in zip(roles, names, strict=True)]
    said = [{"from": role, "value": content} for role, content in names]
    found = as_messages({"conversations": said}, "")
    assert [(one["role"], one["content"]) for one in found] == expected
    said = [{"role": role, "content": content} for role, content in names]
    assert as_messages({"messages": said}, "") == found


@pytest.mark.parametrize(
    "variant", ["what is ttl", " What is  TTL? \n", "What is ＴＴＬ？", "WHAT IS “TTL”!"]
)
def test_the_same_question_in_other_writing_is_one_question(variant):
    """Case, white space, punctuation and width do not make a new question (D2)."""
    assert question_key(variant) == question_key("What is TTL?") == "whatisttl"
    assert question_key("2 + 3") != question_key("2 * 3") and question_key("???") == "???"
    assert question_key("什么是 TTL？") == "什么是ttl"


def test_a_conversation_is_held_out_if_any_of_its_questions_is():
    """So no conversation to train on contains a question that is scored, not even in a later turn (D2)."""
    questions = [f"question {number}" for number in range(300)]
    fraction = 0.2
    held_out = {one for one in questions if unit_hash(question_key(one)) < fraction}
    for first, second in pairwise(questions):
        messages = [message("user", first), CHAT[1], message("user", second), CHAT[1]]
        is_val = unit_hash(split_key(messages)) < fraction
        assert is_val == bool({first, second} & held_out)
        scored = [n for n, one in ((1, first), (3, second)) if one in held_out]
        assert scored_answers(messages, fraction, "folded") == scored
        assert scored_answers(messages, 1.0, "exact") == [1, 3]
    assert 30 < len(held_out) < 90
    assert scored_answers(CHAT, 1e-9, "folded") == [1]  # held out by its skill


def test_older_checkpoints_keep_their_split():
    """What they held out, by the first question letter by letter, no later stage may train on (D1, D2)."""
    talk = [message("user", "Who?"), CHAT[1], message("user", "And he?"), CHAT[1]]
    assert split_key(talk, "exact") == "Who?" and split_key(talk) in ("who", "andhe")
    assert from_dict({"data": {}, "train": {"max_steps": 1}}, "").data.same_question == "exact"
    new = from_dict(to_dict(load_config("tiny")), "")
    assert load_config("tiny").data.same_question == new.data.same_question == "folded"
    with pytest.raises(UserError, match="data.same_question must stay exact"):
        inherited = {"data": {"val_fraction": 0.1, "same_question": "exact"}}
        load_config("tiny", ["data.same_question=folded"], inherited)


def test_a_record_with_text_and_messages(tmp_path):
    """Its text is for pre-training, its messages for chat; its question decides the side of both (D4)."""
    path = tmp_path / "a.jsonl"
    talks = [[message("user", f"q{n}"), message("assistant", f"a{n}")] for n in range(60)]
    records = ({"text": f"text {n}", "messages": talk} for n, talk in enumerate(talks))
    path.write_text("\n".join(map(json.dumps, records)))
    config = RunConfig()
    config.data.paths, config.data.val_fraction = [str(path)], 0.3
    config.data.cache_dir = str(tmp_path)
    pre = {"".join(text) for side, text in Sources(config.data).documents() if side == "val"}
    chat = list(prepare_chat(config, BpeTokenizer([])).dialogues("val"))
    assert pre == {f"text {one[0]['content'][1:]}" for one in chat} and len(pre) > 4
    assert as_document({"text": "plain", "messages": None}, "") == (sha256(b"plain").hexdigest(), "plain")


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
    config.data.cache_dir = str(tmp_path)
    pieces = list(Sources(config.data).documents())
    chat = prepare_chat(config, BpeTokenizer([]))
    answers = {"".join(text).split("\n")[1] for side, text in pieces if side == "val"}
    assert answers == {messages[1]["content"] for messages in chat.dialogues("val")} and 4 < len(answers) < 40
