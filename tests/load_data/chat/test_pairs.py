"""Records of preferences -> rows of ids: what is a label, what is shared, what is cut and what left out."""

import json

import numpy as np
import pytest
import torch

from config.schema import DataConfig
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.pairs import (
    Pair, PairLoader, as_rows, eval_pair_batches, file_pairs, fit_pair, open_pairs, write_pairs,
)  # fmt: skip
from load_data.chat.records import as_pair, message
from load_data.loader import IGNORED
from tests.inference.tools import byte_tokenizer
from utils.errors import UserError

TEMPLATE = ChatTemplate(byte_tokenizer())
END, BREAK = TEMPLATE.end_of_turn
QUESTION = [message("user", "2+2?")]
ANSWERS = {"chosen": "4", "rejected": "five"}


def ids_of(text):
    return TEMPLATE.tokenizer.encode(text)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2+2?", **ANSWERS},
        {"prompt": QUESTION, **{key: [message("assistant", text)] for key, text in ANSWERS.items()}},
        {"prompt": "2+2?", **{key: [*QUESTION, message("assistant", text)] for key, text in ANSWERS.items()}},
    ],
    ids=["texts", "messages", "with the prompt, as in UltraFeedback"],
)
def test_forms_of_a_record(record):
    assert as_pair(record, "f") == (QUESTION, "4", "five")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rejected": None}, 'f, line 3: a pair has "prompt", "chosen" and "rejected"; no rejected'),
        ({"chosen": 4}, "line 3: chosen must be a text, not 4"),
        ({"chosen": "five"}, "chosen and rejected are the same answer"),
        ({"rejected": [message("user", "x")]}, "rejected must be one answer of the assistant"),
        ({"chosen": [message("assistant", "a"), message("assistant", "b")]}, "chosen must be one answer"),
    ],
)
def test_bad_records(changes, words):
    record = {"prompt": "2+2?", **ANSWERS} | changes
    record = {key: value for key, value in record.items() if value is not None}
    with pytest.raises(UserError, match=words):
        as_pair(record, "f, line 3")


def test_labels_are_the_answer_and_its_end_alone():
    """A mask without the end token, or with a token of the prompt, is the classic mistake."""
    prompt = TEMPLATE.prompt(QUESTION)
    pair = Pair(prompt, [*ids_of("4"), END], [*ids_of("five"), END])
    loader = loader_of([pair])
    (batch,) = loader.next_step()
    for row, answer in zip((0, 1), pair[1:], strict=True):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        assert labels[labels != IGNORED].tolist() == answer and answer[-1] == END
        first = (labels != IGNORED).nonzero()[0].item()
        assert ids[: first + 1].tolist() == prompt  # what predicts the first label is the end of the prompt
        real = batch["padding_mask"][row]
        assert ids[real].tolist() == [*prompt, *answer]  # the end token is an input too
    assert BREAK not in batch["labels"]


def loader_of(pairs, batch_size=1, length=64, **changes):
    from load_data.chat.chat_data import Samples

    rows = [row for pair in pairs for row in as_rows(pair, BREAK)]
    lengths = np.array([len(row.ids) for row in rows])
    samples = Samples(*map(np.concatenate, zip(*rows)), lengths)
    return PairLoader(samples, length, batch_size, **changes, packing=False, pad_id=0)


def test_each_pair_once_in_an_epoch_and_its_rows_together():
    """Also with two processes and two micro-batches: the same pairs in the same steps."""
    pairs = [Pair([1, number], [number] * 2, [100 + number]) for number in range(8)]

    def firsts(batches):
        for batch in batches:
            chosen, rejected = batch["labels"][::2], batch["labels"][1::2]
            a, b = ([row[row >= 0][0].item() for row in part] for part in (chosen, rejected))
            assert [100 + one for one in a] == b
            yield from a

    whole = loader_of(pairs, 4)
    one = [sorted(firsts(whole.next_step())) for _ in range(4)]
    assert sorted(one[0] + one[1]) == list(range(8)) == sorted(one[2] + one[3])
    parts = [loader_of(pairs, 1, accumulation_steps=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in one:
        assert sorted(number for part in parts for number in firsts(part.next_step())) == step
    state = whole.state_dict()
    expected = [*firsts(whole.next_step())]
    again = loader_of(pairs, 4)
    again.load_state_dict(state)
    assert [*firsts(again.next_step())] == expected


def test_long_prompts_are_cut_alike_and_long_answers_left_out():
    """The whole answers stay; the prompt loses its oldest turns, then its beginning."""
    turns = [message("user", "first"), message("assistant", "old"), message("user", "a question " * 9)]
    answers = [[*ids_of("yes"), END], [*ids_of("no, no, no"), END]]
    pair = fit_pair(TEMPLATE, turns, answers, 60)
    assert list(pair[1:]) == answers
    assert len(pair.prompt) + len(answers[1]) == 60
    text = TEMPLATE.tokenizer.decode(pair.prompt)
    assert "old" not in text and text.rstrip("\n").endswith("question ")
    assert pair.prompt[-1] == TEMPLATE.before["assistant"][-1]
    assert fit_pair(TEMPLATE, turns, [answers[0], [7] * 45], 60).chosen == answers[0]  # a quarter is left
    assert fit_pair(TEMPLATE, turns, [answers[0], [7] * 46], 60) is None
    (row, other) = as_rows(pair, BREAK)
    assert max(len(row.ids), len(other.ids)) == 61


def test_files(tmp_path):
    """Sides by the question, bad records skipped, too long ones counted; written and read again."""
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(40)]
    records += [{"prompt": "bad"}, {"prompt": "long", "chosen": "x" * 90, "rejected": "no"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    data, skipped = DataConfig(paths=[str(path)], sequence_length=64, val_fraction=0.3), []
    found = list(file_pairs(data, TEMPLATE, skipped))
    assert len(found) == 41 and sum(pair is None for _, pair in found) == 1
    assert len(skipped) == 1 and "line 41: a pair has" in skipped[0]
    sides = {side: [pair for where, pair in found if where == side and pair] for side in ("train", "val")}
    assert min(map(len, sides.values())) > 4
    assert not {str(p.prompt) for p in sides["train"]} & {str(p.prompt) for p in sides["val"]}
    write_pairs(tmp_path, sides, data, TEMPLATE, ["words"])
    opened = open_pairs(tmp_path, TEMPLATE)
    assert opened.summary[0] == "words" and f"train: {len(sides['train'])} pairs" in opened.summary[1]
    batches = list(eval_pair_batches(opened.val, 64, 3, None, pad_id=0))
    rows = torch.cat([(batch["labels"] != IGNORED).sum(1) for batch in batches])
    assert rows.tolist() == [4, 3] * len(sides["val"])  # "yes", "no", and the ends
    with pytest.raises(UserError, match="no pair to hold out"):
        write_pairs(tmp_path, {"train": sides["train"], "val": []}, data, TEMPLATE, [])
