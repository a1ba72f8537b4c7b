"""Rows of the tasks, taken apart again, and scores against a model that is known to be right or wrong."""

import random

import numpy as np
import pytest
import torch

from inference.context import measure
from inference.context.measure import loss_by_position, recall_grid, recalled
from inference.context.tasks import OTHERS, TASKS, Haystack
from load_data.corpora.recall import WORDS
from tests.inference.tools import byte_tokenizer, tiny_model
from utils.errors import UserError

TOKENIZER = byte_tokenizer()
CODE = "".join(f"def handle_{name}_event(self):\n    return {n}\n\n" for n, name in enumerate(WORDS))
HAYSTACK = Haystack(np.array(TOKENIZER.encode(CODE)), TOKENIZER)


def a_row(task, length=600, depth=0.5, seed=0):
    """An item and its row, as text."""
    rng = random.Random(seed)
    item = HAYSTACK.item(task, rng)
    row = HAYSTACK.row(item, length, depth, rng)
    assert len(row) == length
    return item, TOKENIZER.decode(row)


@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("task", TASKS)
def test_the_line_is_there_once_at_its_depth(task, depth):
    item, text = a_row(task, depth=depth)
    line, end = TOKENIZER.decode(item.line), TOKENIZER.decode(item.question + item.answer)
    assert text.count(line) == 1 and text.endswith(end)
    before, after = text.split(line)
    others = text.count("\n# ") + text.startswith("# ")
    assert others == {"passkey": 2, "keys": 2 + OTHERS, "names": 0}[task]  # those, the line and the question
    place = len(before) / (len(before) + len(after) - len(end))
    assert abs(place - depth) < 0.2  # whole lines, and in `keys` other lines before and after
    assert before == "" or before.endswith("\n")


def test_what_is_asked_follows_from_the_line():
    for seed in range(20):
        for task in ("passkey", "keys"):
            item, text = a_row(task, seed=seed)
            line = TOKENIZER.decode(item.line).split()
            assert TOKENIZER.decode(item.question + item.answer).split() == line
            names = [part.split()[0] for part in text.split("# ")[1:]]
            assert names.count(line[1]) == 2  # its note and the question
        item, text = a_row("names", seed=seed)
        name = TOKENIZER.decode(item.line).split("(")[0].removeprefix("def ")
        assert TOKENIZER.decode(item.question + item.answer) == f"    return {name}"
        assert text.count(name) == 2


def test_rows_that_cannot_be_made():
    item = HAYSTACK.item("passkey", random.Random(0))
    for length in (10, len(HAYSTACK.tokens) + 200):
        with pytest.raises(UserError, match=f"no row of {length} tokens"):
            HAYSTACK.row(item, length, 0.5, random.Random(0))
    with pytest.raises(UserError, match="no function or class"):
        Haystack(np.array(TOKENIZER.encode("x = 1\n" * 9)), TOKENIZER).item("names", random.Random(0))


class Copier(torch.nn.Module):
    """Stands for a model: the logits of each token name the token that followed its last occurrence, after
    the same `context` tokens, among the last `reach`."""

    def __init__(self, reach=10_000, context=5):
        super().__init__()
        self.lm_head, self.reach, self.context = torch.nn.Linear(1, 1), reach, context

    def model(self, ids):
        hidden = torch.zeros(*ids.shape, 1)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                key = row[t - self.context : t + 1]
                for s in range(t - 1, max(self.context, t - self.reach) - 1, -1):
                    if key and row[s - self.context : s + 1] == key:
                        hidden[b, t] = row[s + 1]
                        break
        return type("Output", (), {"hidden": hidden})

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., 0].long(), TOKENIZER.vocab_size).float()


def test_a_model_that_copies_is_right_and_one_that_does_not_reach_is_wrong(monkeypatch):
    """By an obvious search for the longest match: all of it, or only lines in the last 150 tokens."""
    monkeypatch.setattr(measure, "ROW_TOKENS", 500)  # several batches
    cells = []
    grid = recall_grid(Copier(), HAYSTACK, "passkey", [200, 300], [0.0, 1.0], 3, done=cells.append)
    assert grid.tolist() == [[100, 100], [100, 100]] and len(cells) == 4
    near = recall_grid(Copier(reach=150), HAYSTACK, "passkey", [300], [0.0, 1.0], 3)
    assert near.tolist() == [[0, 100]]


def test_one_wrong_token_makes_an_answer_wrong():
    ids = [5, 6, 7, 8, 9, 1, 5, 6, 7, 8, 9]
    copier = Copier(context=0)
    assert recalled(copier, [ids, [*ids[:-1], 3]], [3, 3]) == [True, False]
    assert recalled(copier, [[*ids[:-2], 3, 9], ids], [1, 4]) == [False, True]
    assert recalled(copier, [[*ids[:-3], 4, 8, 9]], [2]) == [False]  # 8 followed 7, which is not there


def test_the_loss_of_each_position_is_the_mean_over_windows():
    model, tokens = tiny_model(), np.array(TOKENIZER.encode(CODE)[:200])
    ours = loss_by_position(model, tokens, 30, 100)
    rows = torch.from_numpy(np.stack([tokens[n : n + 31] for n in range(0, 169, 30)]))  # six whole windows
    logs = model(rows[:, :-1]).logits.log_softmax(-1)
    expected = -logs.gather(2, rows[:, 1:, None])[..., 0].mean(dim=0)
    torch.testing.assert_close(ours.float(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(loss_by_position(model, tokens, 30, 2)).all()
