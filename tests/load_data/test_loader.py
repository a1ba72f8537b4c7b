"""Batches: golden values for the shift, and each token seen as often as promised."""

from itertools import chain

import numpy as np
import pytest
import torch

from load_data.loader import TokenLoader, eval_windows
from utils.errors import UserError

TOKENS = np.arange(1000, dtype=np.uint16)  # each token says where it stands


def sequences(batches):
    """The first token of each sequence: where it starts."""
    return [int(row[0]) for batch in batches for row in batch["input_ids"]]


def loader(**changes):
    """A loader of short windows with a few settings changed."""
    settings = {"tokens": TOKENS, "sequence_length": 10, "batch_size": 4, **changes}
    return TokenLoader(**settings)


def test_labels_are_the_tokens_that_follow():
    (batch,) = loader(tokens=np.array([7, 3, 9, 4]), sequence_length=3, batch_size=2).next_step()
    assert batch["input_ids"].tolist() == [[7, 3, 9]] * 2
    assert batch["labels"].tolist() == [[3, 9, 4]] * 2
    for micro_batch in loader(accumulation_steps=3).next_step():
        assert micro_batch["input_ids"].shape == micro_batch["labels"].shape == (4, 10)
        assert micro_batch["input_ids"].dtype == micro_batch["labels"].dtype == torch.int64
        assert torch.equal(micro_batch["labels"], micro_batch["input_ids"] + 1)


def test_an_epoch_visits_every_window_once():
    one = loader(batch_size=1)
    for epoch in range(3):
        starts = np.array([sequences(one.next_step())[0] for _ in range(len(one.starts))])
        assert one.epoch == epoch and one.epoch_progress == epoch + 1
        offset = starts.min()
        assert 0 <= offset < 10
        assert sorted(starts) == list(range(offset, 1000 - 10, 10))  # no gap, no overlap, as many as fit
        assert list(starts) != sorted(starts)
        one.next_step()  # the next epoch begins
        one.load_state_dict({**one.state_dict(), "index_in_epoch": 0})


def test_epochs_differ_and_seeds_differ_and_both_repeat():
    def first(epochs, **changes):
        one = loader(**changes)
        one.start_epoch(epochs)
        return sequences(one.next_step())

    assert first(0) == first(0) != first(1)
    assert first(0) != first(0, seed=1) == first(0, seed=1)


def test_all_offsets_occur_so_that_all_tokens_are_learned():
    offsets = set()
    one = loader()
    for epoch in range(100):
        one.start_epoch(epoch)
        offsets.add(one.starts.min())
    assert offsets == set(range(10))


@pytest.mark.parametrize("division", [(2, 1, 4), (1, 8, 1), (2, 2, 2), (4, 2, 1), (1, 2, 4)])
def test_a_step_is_the_same_however_it_is_divided(division):
    batch_size, accumulation, world = division
    whole = loader(batch_size=8)
    settings = {"batch_size": batch_size, "accumulation_steps": accumulation, "world_size": world}
    ranks = [loader(rank=rank, **settings) for rank in range(world)]
    for _ in range(30):  # 240 windows, of 99 per epoch: some steps reach over the end of one
        expected = sequences(whole.next_step())
        parts = [sequences(one.next_step()) for one in ranks]
        assert sorted(chain(*parts)) == sorted(expected)
        assert {len(part) for part in parts} == {8 // world}
        assert {(one.epoch, one.index_in_epoch) for one in ranks} == {(whole.epoch, whole.index_in_epoch)}


def test_a_step_may_be_longer_than_an_epoch():
    one = TokenLoader(np.arange(21), sequence_length=10, batch_size=7)
    assert len(sequences(one.next_step())) == 7 and one.epoch >= 3
    assert sequences(loader(tokens=TOKENS[:11], batch_size=3).next_step()) == [0, 0, 0]


@pytest.mark.parametrize("steps", [0, 1, 24, 25, 26, 60])
def test_resuming_goes_on_where_it_stopped(steps):
    one = loader()
    for _ in range(steps):
        one.next_step()
    state = one.state_dict()
    assert all(type(value) is int for value in state.values())
    other = loader()
    other.load_state_dict(state)
    for _ in range(30):
        assert sequences(one.next_step()) == sequences(other.next_step())
    assert one.state_dict() == other.state_dict() and one.epoch_progress == other.epoch_progress


@pytest.mark.parametrize("count", range(11, 45))
def test_no_window_reaches_over_the_end(count):
    one = loader(tokens=TOKENS[:count], batch_size=1)
    while one.epoch < 30:
        assert one.next_step()[0]["labels"].max() < count


def test_too_little_text_is_an_error():
    with pytest.raises(UserError, match="10 tokens, too few .*set it to 9 or less"):
        loader(tokens=TOKENS[:10])


@pytest.mark.parametrize("count", [2, 3, 10, 11, 12, 21, 95, 101])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_predicts_every_token_but_the_first_once(count, world):
    tokens = TOKENS[:count]
    predicted = []
    for rank in range(world):
        for batch in eval_windows(tokens, 10, 4, rank=rank, world_size=world):
            inputs, labels = batch["input_ids"], batch["labels"]
            assert inputs.shape == labels.shape and inputs.shape[1] == 10 and 1 <= len(inputs) <= 4
            assert inputs.dtype == labels.dtype == torch.int64 and inputs.min() >= 0 and inputs.max() < count
            kept = labels != -100
            assert torch.equal(labels[kept], inputs[kept] + 1)
            predicted += labels[kept].tolist()
    assert sorted(predicted) == list(range(1, count))


def test_evaluation_goes_in_order():
    batches = list(eval_windows(TOKENS[:36], 10, 2))
    assert sequences(batches) == [0, 10, 20, 30]
    assert batches[1]["labels"][1].tolist() == [31, 32, 33, 34, 35, -100, -100, -100, -100, -100]


def test_a_short_evaluation_spreads_its_windows():
    (batch,) = eval_windows(TOKENS, 10, 4, max_batches=1)
    assert sequences([batch]) == [0, 250, 500, 750]
    assert len(list(eval_windows(TOKENS, 10, 4, max_batches=1000))) == 25
    whole = sequences(eval_windows(TOKENS, 10, 4, max_batches=3))
    halves = [sequences(eval_windows(TOKENS, 10, 2, 3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(chain(*halves)) == whole and len(set(whole)) == 12


def test_a_memory_map_is_read_not_loaded(tmp_path):
    TOKENS.tofile(tmp_path / "t.bin")
    mapped = np.memmap(tmp_path / "t.bin", dtype=np.uint16, mode="r")
    assert sequences(loader(tokens=mapped).next_step()) == sequences(loader().next_step())
    assert sequences(eval_windows(mapped, 10, 4)) == list(range(0, 999, 10))


def test_rows_double_in_equal_shares_of_the_run_and_steps_stay_as_large():
    """3, 6 and 12 tokens; a step has 2 x 12 of them, and every epoch has one length and no window twice."""
    one = loader(sequence_length=12, start_length=3, batch_size=2)
    shapes, seen = [], {}
    for step in range(30):
        (batch,) = one.next_step(step / 30)
        shapes.append(tuple(batch["input_ids"].shape))
        assert torch.equal(batch["labels"], batch["input_ids"] + 1)
        seen.setdefault((one.epoch, shapes[-1]), []).extend(sequences([batch]))
    assert shapes == [(8, 3)] * 10 + [(4, 6)] * 10 + [(2, 12)] * 10
    assert len(seen) == 3 and all(len(starts) == len(set(starts)) for starts in seen.values())
    (batch,) = one.next_step(1.0)
    assert batch["input_ids"].shape == (2, 12)


LENGTHS = [(12, 3, 3), (12, 4, 6), (12, 12, 12), (12, 20, 12), (7, 2, 3)]


@pytest.mark.parametrize(("end", "start", "first"), LENGTHS)
def test_rows_begin_halved_but_no_shorter_than_said(end, start, first):
    one = loader(sequence_length=end, start_length=start)
    assert one.next_step(0.0)[0]["input_ids"].shape[1] == first
    assert one.next_step(0.999)[0]["input_ids"].shape[1] == end


def test_growing_rows_resume_and_divide_as_others_do():
    settings = {"sequence_length": 12, "start_length": 3}
    whole = loader(**settings, batch_size=4)
    settings |= {"batch_size": 1, "accumulation_steps": 2, "world_size": 2}
    ranks = [loader(**settings, rank=rank) for rank in (0, 1)]
    for step in range(12):
        resumed = [loader(**settings, rank=rank) for rank in (0, 1)]
        for old, new in zip(ranks, resumed):
            new.load_state_dict(old.state_dict())
        ranks, progress = resumed, step / 12
        parts = [sequences(one.next_step(progress)) for one in ranks]
        assert sorted(parts[0] + parts[1]) == sorted(sequences(whole.next_step(progress)))
