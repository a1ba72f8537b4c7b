"""The cloze: tables of counts by hand, pseudo-perplexity against a loop, and the whole on a small text."""

import math
import re
import sys

import numpy as np
import pytest
import torch

from config.encoder import EncoderConfig
from config.load import to_dict
from config.schema import RunConfig
from load_data.tokenization.tokenizer import MASK, CharTokenizer
from model.encoder import MaskedLM
from tests.modules.tools import shake
from train.lab import compare_cloze
from train.lab.compare_cloze import Counts, Line, guesses, item_of, pick_lines, rank_of, surprise
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

TEXT = "one two three four\nfive\nsix seven, eight nine\n\nten ten ten ten ten\n" * 6
TOKENIZER = CharTokenizer("".join(sorted(set(TEXT)))).with_special([MASK])
COUNTED = np.array([1, 2, 3, 1, 2, 4, 1, 2, 3, 0, 2, 4], dtype=np.uint16)


def tables(*offsets):
    """Counts of `COUNTED`, whose ids are below 5."""
    return [Counts(COUNTED, one, 5) for one in offsets]


@pytest.fixture(scope="module")
def model():
    """Random weights, in fp64."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shape = EncoderConfig(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=64, **sizes)
    with torch.no_grad():
        return shake(MaskedLM(shape).double()).eval()


def test_counts_by_hand():
    one, two, three, both = tables((), (-1,), (-2, -1), (-1, 1))
    row = [1, 2, 9, 3]  # the place to guess is the third; whatever stands there does not matter
    assert one.ranked(row, 2) == [2, 1, 3, 4, 0]  # 4, 3, 2, 2 and 1 times
    assert two.ranked(row, 2) == [3, 4]  # 2 and 2 times after a 2
    assert three.ranked(row, 2) == [3, 4]  # 2 times after 1 2, and once
    assert both.ranked([1, 9, 4], 1) == [2] and both.ranked([2, 9, 1], 1) == [3, 4]
    assert three.ranked([9, 2], 1) == [] == both.ranked([1, 9], 1)  # beyond the row there is nothing
    assert two.ranked([0, 9], 1) == [2] and two.ranked([4, 9], 1) == [1]  # nothing runs over the end


def test_tables_are_asked_in_turn():
    one, two, three = tables((), (-1,), (-2, -1))
    row = [0, 2, 3, 1]
    assert three.ranked(row, 2) == [4] and guesses([three, two, one], row, 2) == [4, 3, 2, 1, 0]
    assert rank_of([three, two, one], row, 2) == 1 and rank_of([three], row, 2) == 5


def test_ranks_against_a_slow_count():
    """Trigrams of random tokens, counted one by one."""
    tokens = np.random.default_rng(0).integers(4, size=500)
    (table,) = [Counts(tokens, (-2, -1), 4)]
    for a in range(4):
        for b in range(4):
            seen = [tokens[n] for n in range(2, 500) if (tokens[n - 2], tokens[n - 1]) == (a, b)]
            expected = sorted(set(seen), key=lambda one: (-seen.count(one), one))
            assert table.ranked([a, b, 0], 2) == expected


def test_surprise_is_that_of_one_masked_token_after_the_other(model):
    """Rows of several lengths in a batch, so with padding; the tokens themselves are not seen."""
    rows = [TOKENIZER.framed(TOKENIZER.encode(text)) for text in ("ten", "six seven", "one two\n", "n")]
    items = [(row, place) for row in rows for place in range(1, len(row))]
    nll, rank = surprise(model, items, TOKENIZER.special_ids[MASK], TOKENIZER.pad_id)
    for (row, place), one, above in zip(items, nll, rank, strict=True):
        ids = torch.tensor([[*row[:place], TOKENIZER.special_ids[MASK], *row[place + 1 :]]])
        with torch.no_grad():
            logits = model(ids).logits[0, place]
        assert one == pytest.approx(-logits.log_softmax(0)[row[place]].item(), rel=1e-9)
        assert above == (logits > logits[row[place]]).sum()


def test_lines_have_words_and_a_token_to_find():
    ids = np.array([*TOKENIZER.encode(TEXT), TOKENIZER.eos_id, *TOKENIZER.encode("last line of it")])
    found = pick_lines(ids, TOKENIZER, 100, 40, seed=1)
    assert len(found) == 6 * 4  # characters are words here, so only the empty lines have too few
    texts = {TOKENIZER.decode(ids[line.start : line.stop]) for line in found}
    assert texts >= {"one two three four\n", "five\n"} and not any("\n" in text[:-1] for text in texts)
    assert all(TOKENIZER.decode([ids[line.target]]).strip() for line in found)
    assert all(line.start <= line.target < line.stop for line in found)
    assert pick_lines(ids, TOKENIZER, 3, 40, seed=1) == pick_lines(ids, TOKENIZER, 3, 40, seed=1)
    with pytest.raises(UserError, match="no held-out line has 4 words"):
        pick_lines(ids[:10] * 0, TOKENIZER, 3, 40, seed=1)


@pytest.mark.parametrize("line", [Line(0, 3, 2), Line(20, 24, 20), Line(97, 100, 99)])
def test_a_line_is_shown_alone_or_with_its_context(line):
    tokens = np.arange(100)
    row, place = item_of(tokens, TOKENIZER, line, line.target, None)
    assert row == TOKENIZER.framed([*range(line.start, line.stop)]) and row[place] == line.target
    row, place = item_of(tokens, TOKENIZER, line, line.target, 12)
    assert row[place] == line.target and {*range(line.start, line.stop)} <= {*row}
    assert row[1:] == [*range(row[1], row[-1] + 1)] and 7 <= len(row[1:]) <= 12


def test_the_table_of_a_checkpoint(model, tmp_path, monkeypatch, capsys):
    """Two views, four rows each; the pseudo-perplexity is the exponent of the mean."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = RunConfig(encoder=model.config)
    config.data.paths, config.data.cache_dir = [str(tmp_path / "text.txt")], str(tmp_path)
    config.data.sequence_length, config.data.val_fraction, config.train.max_steps = 48, 0.5, 1
    path = tmp_path / "model.pkl"
    about = {"stage": "mlm_train", "short": "MLM", "config": to_dict(config.validate()), "step": 1}
    weights = model.float().state_dict()
    save_checkpoint(path, about | {"tokenizer": TOKENIZER.to_json(), "weights": weights})
    sure = lambda model, items, *ids: ([math.log(3)] * len(items), [0] * len(items))  # noqa: E731
    monkeypatch.setattr(compare_cloze, "surprise", sure)
    monkeypatch.setattr(sys, "argv", ["compare_cloze.py", "--checkpoint", str(path), "--count", "5"])
    compare_cloze.main()
    said = capsys.readouterr().out
    assert "5 lines of held-out text" in said and said.count("pseudo-perplexity of the model 3.00") == 2
    rows = re.findall(r"^(\S[\w -]*?) {2,}([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", said, re.MULTILINE)
    assert [name for name, *_ in rows] == 2 * ["unigram", "trigram", "two-sided", "the model"]
    for _, *shares in rows:
        one, among, every, every_among = map(float, shares)
        assert one <= among <= 100 and every <= every_among <= 100
    assert [float(share) for share in rows[3][1:]] == [100.0] * 4
    unigram, trigram, both = (float(row[3]) for row in rows[4:7])
    assert unigram < min(trigram, both)  # a text that repeats itself
