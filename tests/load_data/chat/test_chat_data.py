"""From paths to dialogues: forms, sides, what is refused, what is cut, and the digest."""

import hashlib
import json
import random
from itertools import groupby, islice

import numpy as np
import pytest

from config.schema import DataConfig
from inference.generation.conversation import prompt_within
from load_data.chat import chat_data
from load_data.chat.chat_data import TRAIN, VAL, Sample, encode, prepare_chat, samples_digest, split_dialogues
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.records import message
from load_data.skills import SFT_SKILLS, SKILLS
from load_data.tokenization.tokenizer import BpeTokenizer
from utils.errors import UserError

TOKENIZER = BpeTokenizer([])


def turns(*contents):
    """Questions and answers in turn."""
    return [message(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]


def dialogues(count):
    """Records with distinct questions, two of each."""
    return [{"messages": turns(f"question {n // 2}", f"answer {n}")} for n in range(count)]


def text(sample):
    """A sample as text, with what is learned in brackets."""
    parts = []
    for learned, pairs in groupby(zip(sample.ids, sample.targets), key=lambda pair: pair[1]):
        part = TOKENIZER.decode([one for one, _ in pairs], skip_special=False)
        parts.append(f"[{part}]" if learned else part)
    return "".join(parts)


def test_every_dialogue_is_on_the_side_of_its_question(run_config, write):
    """The side is the first number of a SHA-256, as `reserved.py` promises."""
    data = prepare_chat(run_config(write("a.jsonl", dialogues(200)), val_fraction=0.2), TOKENIZER)
    expected = {TRAIN: [], VAL: []}
    for record in dialogues(200):
        question, answer = (one["content"] for one in record["messages"])
        held_out = int(hashlib.sha256(question.replace(" ", "").encode()).hexdigest()[:12], 16) / 16**12 < 0.2
        expected[VAL if held_out else TRAIN].append(f"User：{question}\nAssistant：[{answer}<|im_end|>]\n")
    assert [text(one) for one in data.train] == expected[TRAIN]
    assert [text(one) for one in data.val] == expected[VAL]
    assert len(data.val) % 2 == 0 and 20 <= len(data.val) <= 60  # two dialogues of each question
    assert [data.template.dialogue(one)[0] for one in data.dialogues(VAL)] == [
        list(one.ids) for one in data.val
    ]
    assert data.train[0].ids.dtype == np.uint16 and data.train[0].targets.dtype == bool
    learned = sum(len(f"answer {n}") + 1 for n in range(200))
    assert sum(int(one.targets.sum()) for one in [*data.train, *data.val]) == learned


def test_the_summary_counts(run_config, write):
    path = write("a.jsonl", dialogues(1200) + [{"messages": turns("x" * 300, "y")}])
    data = prepare_chat(run_config(path, sequence_length=100, val_fraction=0.01), TOKENIZER)
    summary = "\n".join(data.summary)
    assert max(len(one.ids) for one in data.train) == 101  # inputs and labels fill a row of 100
    for side, part in (("train", data.train), ("val", data.val)):
        tokens, learned = sum(len(one.ids) for one in part), sum(one.targets.sum() for one in part)
        line = f"{side}: {len(part):,} dialogues, {tokens:,} tokens, {learned:,} of them supervised, "
        assert line + f"{int(side == 'train')} dialogues shortened to 101 tokens" in summary
    assert f"{path}: {path.stat().st_size:,} bytes" in summary and TOKENIZER.digest in summary


def test_all_forms_of_records(run_config, write):
    system = message("system", "S")
    records = [
        {"conversations": [system, *turns("a", "b", "c", "d")]},
        {"messages": turns("a", "b", "left without an answer")},
        {"instruction": "do", "input": "this", "output": "done"},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": [system, *turns("p")], "chosen": [message("assistant", "")], "rejected": "bad"},
        {"messages": turns("half \ud800 a letter", "ok")},
    ]
    lines = "\n".join(map(json.dumps, records + dialogues(100)))  # half a letter as an escape
    data = prepare_chat(run_config(write("a.jsonl", lines), val_fraction=0.1), TOKENIZER)
    written = {text(one) for one in [*data.train, *data.val]}
    assert {
        "System：S\nUser：a\nAssistant：[b<|im_end|>]\nUser：c\nAssistant：[d<|im_end|>]\n",
        "User：a\nAssistant：[b<|im_end|>]\n",
        "User：do\nthis\nAssistant：[done<|im_end|>]\n",
        "User：p\nAssistant：[good<|im_end|>]\n",
        "System：S\nUser：p\nAssistant：[<|im_end|>]\n",
        "User：half � a letter\nAssistant：[ok<|im_end|>]\n",
    } <= written
    assert len([*data.train, *data.val]) == 106


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (turns("a"), "no assistant message"),
        ([message("system", "s")], "no assistant message"),
        ([message("system", "s"), *turns("a")], "no assistant message"),
        ([message("assistant", "hello"), *turns("a", "b")], "message 1 has role assistant where user is exp"),
        ([message("system", "s"), message("assistant", "a")], "message 2 has role assistant where user"),
        ([*turns("a"), *turns("a", "b")], "message 2 has role user where assistant is expected"),
        ([*turns("a", "b"), message("assistant", "b")], "message 3 has role assistant where user"),
        (
            [*turns("a", "b"), message("system", "s"), *turns("c", "d")],
            "message 3 has role system where user",
        ),
        ([message("system", "s")] * 2 + turns("c", "d"), "message 2 has role system where user"),
        ([*turns("a"), message("system", "s"), message("assistant", "b")], "message 2 has role system"),
    ],
)
def test_impossible_dialogues_are_skipped(write, messages, problem):
    path, skipped = write("a.jsonl", [*dialogues(1), {"messages": messages}]), []
    assert len(list(split_dialogues(DataConfig([str(path)]), skipped))) == 1 and len(skipped) == 1
    assert f"a.jsonl, line 2: {problem}" in skipped[0]
    with pytest.raises(UserError, match=f"a.jsonl, line 1: {problem}"):
        list(split_dialogues(DataConfig([str(write("a.jsonl", [{"messages": messages}]))]), []))


def test_bad_paths(run_config, write, tmp_path):
    plain = write("folder/a.txt", "text")
    for path, problem in {
        "python": "--data python: .*train/pre_train.py",
        plain: "a.txt: plain text is for train/pre_train.py; chat stages read skills, or dialogues from",
        plain.parent: "folder: plain text is for train/pre_train.py",
        tmp_path / "nowhere": "nowhere: no such file or folder; built in are python",
        "skills:lists,flying": "unknown skill 'flying'; skills: .*identity.*, or all",
        write("a.csv", "text"): "a.csv: .*files with text are read",
    }.items():
        with pytest.raises(UserError, match=problem):
            prepare_chat(run_config(path), TOKENIZER)
    records = write("folder/b.jsonl", dialogues(100))  # beside the text, which is passed over
    assert len(prepare_chat(run_config(plain.parent, val_fraction=0.1), TOKENIZER).train) > 80
    with pytest.raises(UserError, match=r"no validation text; raise data.val_fraction \(now 1e-09\)"):
        prepare_chat(run_config(records, val_fraction=1e-9), TOKENIZER)
    with pytest.raises(UserError, match=r"no training text; lower data.val_fraction"):
        prepare_chat(run_config(records, val_fraction=0.999999), TOKENIZER)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["skills"], SFT_SKILLS),
        (["skills:all"], SKILLS[:-2]),
        (["skills:lists, naming", "x.jsonl"], ("lists", "naming")),
        (["skills:lists", "skills:naming,lists"], ("lists", "naming")),
        (["x.jsonl"], ()),
    ],
)
def test_words_for_skills(paths, expected):
    assert tuple(chat_data.chosen_skills(paths)) == expected


@pytest.fixture
def toy_skills(monkeypatch):
    """Skills whose dialogues say which they are."""

    def make(side):
        def generate(names, count, seed, val_fraction):
            assert (seed, val_fraction) == (0, 0.1)
            for name in names if side == "val" else ["+".join(names)]:
                yield from (turns(f"{side} {name} {number}", "answer") for number in range(count))

        return generate

    monkeypatch.setattr(chat_data, "training_dialogues", make("train"))
    monkeypatch.setattr(chat_data, "held_out_dialogues", make("val"))


def test_skills_keep_their_sides(run_config, write, toy_skills):
    config = run_config(
        "skills:lists,naming", write("a.jsonl", dialogues(100)), skill_samples=70, val_fraction=0.1
    )
    data = prepare_chat(config, TOKENIZER)
    assert [one[0]["content"] for one in islice(data.dialogues(VAL), 200)] == [
        f"val {name} {number}" for name in ("lists", "naming") for number in range(100)
    ]
    assert [text(one) for one in islice(data.train, 70)] == [
        f"User：train lists+naming {number}\nAssistant：[answer<|im_end|>]\n" for number in range(70)
    ]
    assert len(data.train) + len(data.val) == 370 and len(data.val) > 200
    assert data.summary[0] == "skills: lists, naming"


@pytest.mark.parametrize("limit", [2, 10, 60, 65])
def test_a_limit_leaves_both_sides(run_config, write, toy_skills, limit):
    config = run_config("skills:lists,naming", skill_samples=60, val_fraction=0.1, limit=limit)
    data = prepare_chat(config, TOKENIZER)
    assert len(data.val) == max(1, round(limit / 10)) and len(data.train) + len(data.val) == limit
    if limit >= 60:
        assert {one[0]["content"].split()[1] for one in data.dialogues(VAL)} == {"lists", "naming"}
    path = write("a.jsonl", dialogues(100))
    data = prepare_chat(run_config(path, val_fraction=0.5, limit=limit), TOKENIZER) if limit > 2 else data
    assert len(data.train) + len(data.val) == limit


def test_a_limit_is_shared_by_all_sources(run_config, write, toy_skills):
    """`--data skills my.jsonl --limit 100` once read no line of my.jsonl (D9)."""
    files = [write("a.jsonl", dialogues(30)), write("b.jsonl", dialogues(200))]
    config = run_config("skills:lists", *files, val_fraction=0.1, limit=120)
    data = prepare_chat(config, TOKENIZER)
    first = [one[0]["content"].split()[0] for side in (TRAIN, VAL) for one in data.dialogues(side)]
    assert len(first) == 120 and first.count("question") == 30 + 45 and first.count("val") == 4
    begun = [one[0]["content"] for one in islice(data.dialogues(TRAIN), 2)]
    assert begun != ["train lists 0", "train lists 1"]


def test_the_embedded_skills_are_read(run_config):
    data = prepare_chat(run_config("skills:lists", skill_samples=30), TOKENIZER)
    assert len(data.train) == 30 and 1 <= len(data.val) <= 100
    assert all(one.targets.any() for one in [*data.train, *data.val])


def test_templates_and_soft_tokens(run_config, write):
    path = write("a.jsonl", dialogues(60))
    config = run_config(path, template="chatml", val_fraction=0.2)
    config.model.vocab_size = 300
    data = prepare_chat(config, TOKENIZER, soft_tokens=2)
    assert text(data.train[0]).startswith("<|im_start|>user\nquestion")
    soft = [one for one in data.train[0].ids if one >= TOKENIZER.vocab_size]
    assert soft == [302, 303, 304, 305]
    config.model.vocab_size = 0  # not decided: as many as the tokenizer has
    assert max(prepare_chat(config, TOKENIZER, soft_tokens=2).train[0].ids) == TOKENIZER.vocab_size + 5


# --- what is too long ----------------------------------------------------------------------------


def lengths(room):
    """Contents with system, question and answer of many lengths, around a room."""
    rng = random.Random(room)
    yield from ((system, 3, room) for system in (None, 0, 3, room))
    yield from ((system, room, 3) for system in (None, 0, 3, room))
    for _ in range(60):
        yield tuple(rng.randrange(3 * room) for _ in range(3))


@pytest.mark.parametrize("kind", ["tinyseek", "chatml"])
@pytest.mark.parametrize("room", [64, 101])
def test_one_turn_that_is_too_long(kind, room):
    """Rules, one by one, on the three contents that are left."""
    template = ChatTemplate(TOKENIZER, kind, soft_tokens=1)
    for system, question, answer in lengths(room):
        letters = {"user": "abcdefghij" * room, "assistant": "ABCDEFGHIJ" * room}
        messages = turns(letters["user"][:question], letters["assistant"][:answer])
        if system is not None:
            messages = [message("system", "0123456789" * room)] + messages
            messages[0]["content"] = messages[0]["content"][:system]
        whole = template.dialogue(messages)[0]
        sample, was_cut = encode(template, messages, room)
        assert was_cut == (len(whole) > room) and len(sample.ids) == min(len(whole), room)
        assert sample.targets[1:].any()
        left = "".join(TOKENIZER.decode([one]) for one in sample.ids if one < TOKENIZER.vocab_size)
        for role in ("system", "user", "assistant"):  # their words, which templates write too
            left = left.replace(f"{role}\n", "")
        kept = {
            "user": "".join(letter for letter in left if letter.islower()),
            "assistant": "".join(letter for letter in left if letter.isupper()),
            "system": "".join(letter for letter in left if letter.isdigit()),
        }
        assert messages[-2]["content"].endswith(kept["user"])
        assert messages[-1]["content"].startswith(kept["assistant"])
        least = room // 4
        if len(kept["assistant"]) < answer:  # the question gave way first
            assert len(kept["user"]) == min(question, least)
            assert TOKENIZER.special_ids["<|im_end|>"] not in sample.ids[sample.targets]
            assert len(kept["assistant"]) >= least
        else:
            assert sample.ids[sample.targets][-1] == TOKENIZER.special_ids["<|im_end|>"] or (
                len(kept["user"]) == min(question, least)
            )
        if system is not None:
            assert messages[0]["content"].startswith(kept["system"])
            if len(kept["system"]) < system:  # it is the last to give way
                assert len(kept["user"]) == min(question, least)
                assert sample.targets.sum() <= least
        learned = sample.ids[sample.targets].tolist()
        expected = [*TOKENIZER.encode(kept["assistant"]), TOKENIZER.special_ids["<|im_end|>"]]
        assert learned == expected[: len(learned)] and len(expected) - len(learned) <= 1


def test_old_turns_go_before_anything_is_cut():
    template = ChatTemplate(TOKENIZER)
    messages = [message("system", "S"), *turns("old " * 9, "one", "new question", "new answer")]
    sample, was_cut = encode(template, messages, 60)
    assert was_cut and text(sample) == "System：S\nUser：new question\nAssistant：[new answer<|im_end|>]\n"
    assert text(encode(template, messages, 29)[0]) == (  # one less than the last turn takes
        "System：S\nUser：ew question\nAssistant：[new answer<|im_end|>]\n"
    )


@pytest.mark.parametrize("kind", ["tinyseek", "chatml"])
@pytest.mark.parametrize("system", [0, 5, 80])
@pytest.mark.parametrize("question", [5, 21, 90])
def test_a_prompt_is_cut_as_training_cuts(kind, system, question):
    """A long system message once erased the question at inference, though training kept it (D10)."""
    template, room = ChatTemplate(TOKENIZER, kind), 68
    words = "what is two plus two?"[:question].rjust(question, "w")
    messages = [message("system", "S" * system), *turns(words, "")]
    end = len(template.after["assistant"])
    asked = prompt_within(template, messages[:-1], room)
    trained = encode(template, messages, room + end)[0].ids.tolist()  # room // 4 is the same for both
    assert asked == trained[:-end] if len(trained) > len(asked) else asked == trained
    assert len(asked) <= room and TOKENIZER.decode(asked).count("plus two?") == (question > 9)


def test_a_row_without_room_for_markers_is_an_error():
    template = ChatTemplate(TOKENIZER, "chatml", soft_tokens=4)
    messages = turns("question", "answer")
    with pytest.raises(UserError, match=r"data.sequence_length=19 is too short .* for example to \d+"):
        encode(template, messages, 20)
    for room in range(3, 40):  # never without anything to learn
        try:
            (ids, targets), _ = encode(ChatTemplate(TOKENIZER), turns("question " * 9, "answer " * 9), room)
        except UserError:
            assert room < 8
        else:
            assert len(ids) == len(targets) == room and any(targets)


def test_ids_beyond_two_bytes(run_config, write):
    wide = encode(ChatTemplate(TOKENIZER, soft_tokens=1, vocab_size=2**16), turns("a", "b"), 99)[0]
    assert wide.ids.dtype == np.int32 and wide.ids.max() == 2**16 + 2
    config = run_config(write("a.jsonl", dialogues(60)), val_fraction=0.2)
    config.model.vocab_size = 2**16
    data = prepare_chat(config, TOKENIZER, soft_tokens=1)
    assert data.val[0].ids.dtype == np.int32 and data.val[0].ids.max() == 2**16 + 2


# --- the digest ----------------------------------------------------------------------------------


def test_the_digest_says_everything(run_config, write):
    def sample(ids, targets):
        return Sample(np.array(ids, dtype=np.int32), np.array(targets, dtype=bool))

    one, two = sample([1, 2, 3], [0, 1, 1]), sample([4, 5], [0, 1])
    variants = [
        {TRAIN: [one, two], VAL: [one]},
        {TRAIN: [two, one], VAL: [one]},
        {TRAIN: [one], VAL: [two, one]},
        {TRAIN: [one, two], VAL: [two]},
        {TRAIN: [sample([1, 2, 3], [0, 0, 1]), two], VAL: [one]},
        {TRAIN: [sample([1, 2, 7], [0, 1, 1]), two], VAL: [one]},
        {TRAIN: [sample([1, 2, 3, 4, 5], [0, 1, 1, 0, 1])], VAL: [one]},
        {TRAIN: [sample([0], [0]), sample([0, 0], [0, 0])], VAL: []},
        {TRAIN: [sample([0, 0], [0, 0]), sample([0], [0])], VAL: []},
    ]
    digests = [samples_digest(part) for part in variants]
    assert len(set(digests)) == len(digests) and all(len(one) == 16 for one in digests)
    path = write("a.jsonl", dialogues(100))
    config = run_config(path, val_fraction=0.1)
    first = prepare_chat(config, TOKENIZER)
    assert (
        first.digest
        == prepare_chat(config, TOKENIZER).digest
        == samples_digest({TRAIN: first.train, VAL: first.val})
    )
    assert first.digest != prepare_chat(run_config(path, val_fraction=0.1, limit=99), TOKENIZER).digest
