"""Encoded dialogues on disk: written once, mapped, never outdated or incomplete."""

import tracemalloc

import numpy as np
import pytest

from load_data import packing
from load_data.chat import chat_data
from load_data.chat.chat_data import TRAIN, VAL, Sample, prepare_chat, samples_digest, split_dialogues
from load_data.chat.chat_loader import DialogueRows
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.records import message
from load_data.corpora import sources
from load_data.corpora.python_corpus import PythonCorpus, SourceFile
from load_data.skills import docstrings
from load_data.tokenization.tokenizer import BpeTokenizer
from utils.errors import UserError

TOKENIZER = BpeTokenizer([])


def dialogues(count, answer="answer"):
    """Records of one turn with distinct questions."""
    return [
        {"messages": [message("user", f"question {n}"), message("assistant", f"{answer} {n}")]}
        for n in range(count)
    ]


def test_a_second_start_encodes_nothing(run_config, write, monkeypatch):
    """It gives the same dialogues, and tells a person the same."""
    long = {"messages": dialogues(1, "long " * 200)[0]["messages"]}
    path = write("a.jsonl", [*dialogues(100), long, {"bad": 1}])
    config = run_config("skills:lists", path, val_fraction=0.2, skill_samples=20, sequence_length=512)
    first, read = prepare_chat(config, TOKENIZER), [*split_dialogues(config.data, [])]
    monkeypatch.setattr(ChatTemplate, "dialogue", None)
    monkeypatch.setattr(chat_data, "split_dialogues", None)
    second = prepare_chat(config, TOKENIZER)
    assert second.summary == first.summary and "skills: lists" in second.summary
    said = "\n".join(second.summary)
    assert "line 102: a record of unknown form" in said and " 1 dialogues shortened to 513 tokens" in said
    assert second.digest == first.digest == samples_digest({TRAIN: second.train, VAL: second.val})
    for side in (TRAIN, VAL):
        assert [*second.dialogues(side)] == [messages for of, messages in read if of == side]


def test_what_is_mapped_takes_no_memory(run_config, write):
    """Ids, targets and messages once took 29 bytes a token, and rows 3 more (D22)."""
    prepare_chat(run_config(write("few.jsonl", dialogues(60)), val_fraction=0.2), TOKENIZER)  # imports
    config = run_config(write("a.jsonl", dialogues(3000, "an answer of some length")), val_fraction=0.05)
    tracemalloc.start()
    try:
        data = prepare_chat(config, TOKENIZER)
        held, _ = tracemalloc.get_traced_memory()
        rows = DialogueRows(data.train, config.data.sequence_length, True, 0)
        with_rows, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tokens = len(data.train.ids)
    assert tokens > 100_000 and held < tokens and with_rows - held < tokens  # 16 bytes for each dialogue
    assert np.shares_memory(rows.samples.ids, data.train.ids) and not data.train.ids.flags.writeable
    assert (data.train.ids.itemsize, data.train.targets.itemsize) == (2, 1)


def test_samples_are_a_sequence():
    parts = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]), ([6], [1])]
    parts = [Sample(np.array(ids), np.array(targets, dtype=bool)) for ids, targets in parts]
    samples = DialogueRows(parts, 3, True, 0).samples
    plain = lambda some: [(one.ids.tolist(), one.targets.tolist()) for one in some]  # noqa: E731
    assert plain(samples) == plain(parts) and len(samples) == 3
    assert plain([samples[-1], samples[-3]]) == plain(parts[2::-2])
    with pytest.raises(IndexError):
        samples[3]


# --- what decides the content ----------------------------------------------------------------------


def test_changed_content_is_prepared_anew(run_config, write, monkeypatch):
    path = write("a.jsonl", dialogues(100))

    def found(tokenizer=TOKENIZER, soft_tokens=0, paths=("skills:lists,docstrings", path), **changes):
        settings = {"val_fraction": 0.1, "skill_samples": 30, "sequence_length": 64} | changes
        data = prepare_chat(run_config(*paths, **settings), tokenizer, soft_tokens)
        assert data.digest == samples_digest({TRAIN: data.train, VAL: data.val})
        read = [*split_dialogues(run_config(*paths, **settings).data, [])]
        assert [*data.dialogues(TRAIN)] == [messages for side, messages in read if side == TRAIN]
        return data.digest, data.folder

    def library(word):
        lines = "\n".join(f'def name{n}(a):\n    """{word} the number {n} of all."""' for n in range(40))
        files = [SourceFile(f"{word}.py", lines)]
        for module in (sources, docstrings):
            monkeypatch.setattr(module, "read_python_corpus", lambda _: PythonCorpus(files, files))
        docstrings.entries.cache_clear()

    library("Return")
    monkeypatch.setattr(chat_data, "VAL_PER_SKILL", 5)
    first = found()
    everything = [
        first,
        found(template="chatml"),
        found(BpeTokenizer([("e", "s")])),
        found(soft_tokens=1),
        found(sequence_length=28),
        found(val_fraction=0.3),
        found(limit=90),
        found(skill_samples=31),
        found(paths=["skills:lists", path]),
        found(paths=["skills:lists,docstrings"]),
        found(paths=["skills:docstrings,lists", path]),
    ]
    path.write_text(path.read_text(encoding="utf-8").replace("answer", "ANSWER"))  # the same size
    everything.append(found())
    library("Remove")
    everything.append(found())
    monkeypatch.setattr(chat_data, "VAL_PER_SKILL", 3)
    everything.append(found())
    assert [len(set(one)) for one in zip(*everything)] == [len(everything)] * 2
    folders = {folder for _, folder in everything}
    assert found()[1] in folders and found(same_question="exact")[1] not in folders
    monkeypatch.setattr(sources, "code_hash", lambda: "the code has changed")
    assert found()[1] not in folders
    docstrings.entries.cache_clear()


def test_an_interrupted_preparation_leaves_nothing(run_config, write, monkeypatch, tmp_path):
    path = write("a.jsonl", dialogues(100))
    config, cache = run_config(path, val_fraction=0.2), tmp_path / "cache"
    for changes, words in (
        ({"sequence_length": 3}, "data.sequence_length=3 is too short"),
        ({"val_fraction": 1e-9}, "no validation text"),
        ({"val_fraction": 0.999999}, "no training text"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_chat(run_config(path, **changes), TOKENIZER)
        assert not [*cache.iterdir()]
    for remove in (packing.shutil.rmtree, lambda *_, **__: None):  # the second dies without clean-up
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(packing.shutil, "rmtree", remove)
            patch.setattr(chat_data, "samples_digest", lambda _: 1 / 0)
            prepare_chat(config, TOKENIZER)
    assert [one.name[:8] for one in cache.iterdir()] == ["partial_"]
    data = prepare_chat(config, TOKENIZER)
    assert len(data.train) + len(data.val) == 100 and data.folder.name.startswith("dialogues_")
