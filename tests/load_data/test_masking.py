"""Masked rows: the shares of BERT, special tokens left alone, the same masks however a step is divided."""

import numpy as np
import pytest
import torch

from config.objectives import MLMConfig
from config.schema import TokenizerConfig
from load_data.masking import HELD_OUT, MaskedLoader, Masking, count_rows, encode_masked, eval_masked
from load_data.tokenization.tokenizer import MASK, CharTokenizer
from load_data.tokenization.train_tokenizer import learn_merges
from utils.errors import UserError

TOKENIZER = CharTokenizer(" abcdefghijklmnopqrstuvwxyz").with_special([MASK])
SPECIAL = {*TOKENIZER.special_ids.values()}
HIDDEN = TOKENIZER.special_ids[MASK]
FIRST = TOKENIZER.encode(" ")[0]
TOKENS = (np.random.default_rng(0).integers(27, size=4000) + FIRST).astype(np.uint16)
TOKENS[::40] = TOKENIZER.eos_id


class Framed:
    """`TOKENIZER` with a token before and two after each text, as an imported one may have."""

    begin, finish = [TOKENIZER.eos_id], [TOKENIZER.pad_id, TOKENIZER.eos_id]
    vocab_size, special_ids, pad_id = TOKENIZER.vocab_size, TOKENIZER.special_ids, TOKENIZER.pad_id


def loader(masking=None, length=17, *sizes, **settings):
    """A loader of short rows."""
    masking = masking or Masking(TOKENIZER, MLMConfig())
    return MaskedLoader(TOKENS, masking, length, *(sizes or (8,)), **settings)


def originals(batch):
    """The rows before anything was hidden: a label where there is one."""
    return torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])


def test_the_shares_are_those_of_the_paper():
    """Of 15 % of the ordinary tokens 80 % become the mask, 10 % another, 10 % stay; five deviations."""
    masking = Masking(TOKENIZER, MLMConfig())
    ids = np.tile(TOKENS, 50)
    given, labels = masking.row(ids, (0,))
    assert given[0] == TOKENIZER.eos_id and labels[0] == -100 and len(given) == len(ids) + 1
    given, labels, ordinary = given[1:], labels[1:], ~np.isin(ids, [*SPECIAL])
    asked = labels >= 0
    assert not asked[~ordinary].any() and np.array_equal(given[~asked], ids[~asked])
    assert np.array_equal(labels[asked], ids[asked])  # the token AT this place: nothing is shifted
    kinds = {"mask": given == HIDDEN, "kept": given == ids, "random": (given != HIDDEN) & (given != ids)}
    expected = {"mask": 0.8, "kept": 0.1 + 0.1 / 27, "random": 0.1 - 0.1 / 27}  # a random one may be itself
    for count, of, share in [(asked.sum(), ordinary.sum(), 0.15)] + [
        ((asked & kinds[name]).sum(), asked.sum(), share) for name, share in expected.items()
    ]:
        assert abs(count - of * share) < 5 * (of * share * (1 - share)) ** 0.5
    swapped = given[asked & kinds["random"]]
    assert len({*swapped.tolist()}) == 27 and not SPECIAL & {*swapped.tolist()}


def test_rows_have_the_frame_of_the_tokenizer():
    (batch,) = loader(Masking(Framed, MLMConfig(mask_ratio=0.9)), 12).next_step()
    ids = batch["input_ids"]
    assert ids.shape == batch["labels"].shape == (8, 12) and "padding_mask" not in batch
    assert (ids[:, 0] == TOKENIZER.eos_id).all()
    assert (ids[:, -2:] == torch.tensor(Framed.finish)).all() and (batch["labels"][:, -2:] == -100).all()
    with pytest.raises(UserError, match="data.sequence_length=3 leaves no room .*set it to 4 or more"):
        loader(Masking(Framed, MLMConfig()), 3)


@pytest.mark.parametrize("division", [(2, 4, 1), (4, 1, 2), (1, 2, 4)])
def test_masks_are_the_same_however_a_step_is_divided(division):
    batch_size, accumulation, world = division
    whole = loader(seed=5)
    ranks = [loader(None, 17, batch_size, accumulation, rank, world, seed=5) for rank in range(world)]
    for _ in range(70):  # 560 of 249 windows an epoch: some steps take from two of them
        (expected,) = whole.next_step()
        parts = [one.next_step() for one in ranks]
        rows = [part[key] for key in ("input_ids", "labels") for step in zip(*parts) for part in step]
        half = len(rows) // 2
        assert torch.equal(torch.cat(rows[:half]), expected["input_ids"])
        assert torch.equal(torch.cat(rows[half:]), expected["labels"])


def test_masks_are_drawn_anew_in_each_epoch_and_a_resumed_run_goes_on_with_them():
    """Sixteen tokens are one window: a step of three rows takes it from three epochs."""
    short = MaskedLoader(TOKENS[1:18], Masking(TOKENIZER, MLMConfig(mask_ratio=0.5)), 17, 3)
    (batch,) = short.next_step()
    assert short.epoch == 2 and len({tuple(row) for row in originals(batch).tolist()}) == 1
    assert len({tuple(row) for row in (batch["labels"] >= 0).tolist()}) == 3
    one, other = loader(start_length=5, seed=1), loader(start_length=5, seed=1)
    sizes = [one.next_step(progress)[0]["input_ids"].shape for progress in (0.0, 0.4, 0.7)]
    assert sizes == [(8 * 4, 5), (8 * 2, 9), (8, 17)]  # with the token before the text
    one.start_epoch(one.epoch)
    other.load_state_dict(one.state_dict())
    for progress in (0.7, 0.9, 0.9):
        (mine,), (again,) = one.next_step(progress), other.next_step(progress)
        assert all(torch.equal(mine[key], again[key]) for key in mine)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("world", [1, 3])
def test_an_evaluation_reads_everything_once_and_always_hides_the_same(count, world):
    masking = Masking(TOKENIZER, HELD_OUT)

    def rows():
        found, hidden = [], []
        for rank in range(world):
            for batch in eval_masked(TOKENS[:count], masking, 17, 2, rank=rank, world_size=world):
                real = batch.get("padding_mask", torch.ones_like(batch["labels"], dtype=torch.bool))
                assert (batch["labels"][~real] == -100).all()
                assert ((batch["input_ids"] == HIDDEN) == (batch["labels"] >= 0)).all()  # never a random one
                found += [row[keep][1:].tolist() for row, keep in zip(originals(batch), real)]
                hidden.append(batch["labels"])
        return sorted(found), [labels.tolist() for labels in hidden]

    assert rows() == rows()
    expected = [TOKENS[:count][start : start + 16].tolist() for start in range(0, count, 16)]
    assert rows()[0] == sorted(expected) and len(expected) == count_rows(TOKENS[:count], masking, 17)


@pytest.fixture(scope="module")
def words():
    """A tokenizer whose tokens are words with the space before them."""
    text = "import os\nimport sys\nfor x in os:\n    return x\n" * 30
    return learn_merges(TokenizerConfig(vocab_size=330), [text]).with_special([MASK])


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("import [MASK]\n", "import", "\n"),  # the space is a part of " os"
        ("for x in [MASK]:\n    return x", "for x in", ":\n    return x"),
        ("for x in os:\n    [MASK] x", "for x in os:\n    ", " x"),  # an indentation is a token of its own
        ("[MASK] os", "", " os"),
        ("ret[MASK]", "ret", ""),
    ],
)
def test_a_mask_takes_the_space_that_its_word_would_have(words, text, before, after):
    ids = encode_masked(words, text)
    place = ids.index(words.special_ids[MASK])
    assert ids[0] == words.eos_id and words.decode(ids[:place]) == before
    assert words.decode(ids[place + 1 :]) == after
    whole = words.encode_open([text.replace("[MASK]", "x")])[0]  # as in training
    assert len(whole) == len(ids) - 1 or before == "ret"


def test_masks_are_cut_out_before_the_tokenizer_sees_the_text(words):
    text = f"[MASK][MASK] {MASK} x"
    ids = encode_masked(words, text)
    assert ids[1:3] == [words.special_ids[MASK]] * 2 and ids.count(words.special_ids[MASK]) == 2
    assert words.decode(ids[3:]) == f" {MASK} x"
    letters = encode_masked(TOKENIZER, "a [MASK] b")
    assert letters[1:] == [*TOKENIZER.encode("a "), HIDDEN, *TOKENIZER.encode(" b")]
