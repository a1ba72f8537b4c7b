"""Rows of dialogues: labels against an obvious loop, packed training equal to unpacked, nothing leaks."""

import time
from itertools import chain

import numpy as np
import pytest
import torch

from load_data.chat.chat_data import Sample
from load_data.chat.chat_loader import ChatLoader, DialogueRows, count_eval_rows, eval_chat_batches, pack_rows
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config

PAD = 6
KEYS = ["input_ids", "labels", "document_ids", "position_ids", "padding_mask"]


def sample(ids, targets):
    """A sample from lists."""
    return Sample(np.array(ids, dtype=np.int32), np.array(targets, dtype=bool))


def random_samples(count, longest, seed=0, shortest=2):
    """Samples whose first id says which they are, with a random mask."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = rng.integers(7, 61, rng.integers(shortest, longest + 1))
        ids[0] = 1000 + number
        made.append(sample(ids, rng.random(len(ids)) < 0.5))
    return made


SAMPLES = random_samples(40, 11)


def loader(samples=SAMPLES, **changes):
    """A loader of short rows with a few settings changed."""
    return ChatLoader(samples, **{"sequence_length": 16, "batch_size": 4, "pad_id": PAD, **changes})


def names(batches):
    """Which samples are in some batches, by their first ids."""
    return [int(one) - 1000 for batch in batches for one in batch["input_ids"].flatten() if one >= 1000]


def test_by_hand():
    """The example at the head of the file."""
    samples = [sample([10, 11, 12, 13], [0, 0, 1, 1]), sample([20, 21, 22], [0, 1, 1])]
    batch = DialogueRows(samples, 8, True, PAD).batch([[0, 1], [1]])
    assert list(batch) == KEYS
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 6, 6, 6], [20, 21, 6, 6, 6, 6, 6, 6]]
    assert batch["labels"].tolist() == [[-100, 12, 13, 21, 22, -100, -100, -100], [21, 22] + [-100] * 6]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, -1, -1, -1], [0, 0] + [-1] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1] + [0] * 6]
    assert batch["padding_mask"].tolist() == [[True] * 5 + [False] * 3, [True] * 2 + [False] * 6]
    assert [batch[key].dtype for key in KEYS] == [torch.int64] * 4 + [torch.bool]
    narrow = DialogueRows(samples, 8, False, PAD).batch([[1], [0]])  # as wide as the longest of them
    assert narrow["input_ids"].tolist() == [[20, 21, 6], [10, 11, 12]]
    assert narrow["labels"].tolist() == [[21, 22, -100], [-100, 12, 13]]


@pytest.mark.parametrize("packing", [True, False])
def test_labels_against_an_obvious_loop(packing):
    one = loader(packing=packing, batch_size=3)
    for _ in range(12):
        (batch,) = one.next_step()
        for row in range(3):
            begins, line = 0, {key: batch[key][row].tolist() for key in KEYS}
            for document, number in enumerate(names([{"input_ids": batch["input_ids"][row]}])):
                ids, targets = SAMPLES[number]
                for place in range(len(ids) - 1):
                    here = begins + place
                    assert line["input_ids"][here] == ids[place]
                    assert line["labels"][here] == (ids[place + 1] if targets[place + 1] else -100)
                    assert line["document_ids"][here] == document and line["position_ids"][here] == place
                    assert line["padding_mask"][here] is True
                begins += len(ids) - 1
            rest = len(line["labels"]) - begins
            assert line["input_ids"][begins:] == [PAD] * rest and line["labels"][begins:] == [-100] * rest
            assert line["document_ids"][begins:] == [-1] * rest
            assert line["padding_mask"][begins:] == [False] * rest
            assert packing <= (len(line["labels"]) == 16) and document < (16 if packing else 1)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_visits_every_sample_once(packing):
    one = loader(batch_size=1, packing=packing)
    orders = []
    for epoch in range(3):
        steps = [one.next_step() for _ in range(len(one.starts))]
        orders.append([name for batches in steps for name in names(batches)])
        assert sorted(orders[-1]) == list(range(40))
        assert one.epoch == epoch and one.epoch_progress == epoch + 1
        one.next_step()  # the next epoch begins
        one.load_state_dict({**one.state_dict(), "index_in_epoch": 0})
    assert len(set(map(tuple, orders))) == 3
    assert names(loader(seed=1, packing=packing).next_step()) != names(loader(packing=packing).next_step())


@pytest.mark.parametrize("division", [(2, 1, 4), (1, 8, 1), (2, 2, 2), (4, 2, 1), (1, 2, 4)])
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_the_same_however_it_is_divided(division, packing):
    """The rows of ranks and micro-batches, side by side, are those of one large batch."""
    batch_size, accumulation, world = division
    settings = {"batch_size": batch_size, "accumulation_steps": accumulation, "world_size": world}
    whole = loader(batch_size=8, packing=packing)
    ranks = [loader(rank=rank, packing=packing, **settings) for rank in range(world)]

    def labels(batch):
        return [[one for one in row if one != -100] for row in batch["labels"].tolist()]

    for _ in range(12):  # some steps reach over the end of an epoch
        (expected,) = whole.next_step()
        steps = [one.next_step() for one in ranks]
        parts = [step[number] for number in range(accumulation) for step in steps]
        assert list(chain(*map(labels, parts))) == labels(expected)
        assert names(parts) == names([expected])
        assert {(one.epoch, one.index_in_epoch) for one in ranks} == {(whole.epoch, whole.index_in_epoch)}
    assert whole.epoch >= 1


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 9, 30])
def test_resuming_goes_on_where_it_stopped(steps):
    one, other = loader(), loader()
    for _ in range(steps):
        one.next_step()
    state = one.state_dict()
    assert all(type(value) is int for value in state.values())
    other.load_state_dict(state)
    for _ in range(12):
        assert torch.equal(one.next_step()[0]["labels"], other.next_step()[0]["labels"])
    assert one.state_dict() == other.state_dict()


def test_few_and_impossible_samples():
    one = loader(SAMPLES[:1], batch_size=5)
    assert names(one.next_step()) == [0] * 5 and one.epoch == 4
    with pytest.raises(ValueError, match="must be samples"):
        loader([])
    with pytest.raises(ValueError, match="at most 17 ids"):
        loader([sample(range(18), [1] * 18)])
    assert names(loader([sample([1000, *range(7, 23)], [1] * 17)], batch_size=1).next_step()) == [0]


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_everything_once_and_are_not_overfull(seed):
    """Best fit by looking at every row there is."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, 200).tolist()
    rows = pack_rows(lengths, 20)
    fullness = []
    for length in lengths:
        fits = [number for number, used in enumerate(fullness) if used + length <= 20]
        if fits:
            fullness[max(fits, key=fullness.__getitem__)] += length
        else:
            fullness.append(length)
    assert sorted(chain(*rows)) == list(range(200))
    assert sorted(sum(lengths[item] for item in row) for row in rows) == sorted(fullness)
    assert all(row == sorted(row) for row in rows)


@pytest.mark.parametrize("length", [256, 512])
def test_rows_are_full_and_packed_fast(length):
    rng = np.random.default_rng(0)
    lengths = rng.integers(15, 121, 50_000).tolist()
    clock = time.perf_counter()
    rows = pack_rows(lengths, length)
    took = time.perf_counter() - clock
    assert sum(lengths) / (len(rows) * length) > 0.98
    assert took < 2  # a tenth of that on an idle machine; an hour if every row were looked at


MODELS = {
    "dense": {"num_hidden_layers": 2},
    "moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
    },
}


def readable(samples):
    """Samples without the ids that say which they are."""
    return [sample([one.ids[0] % 50 + 7, *one.ids[1:]], one.targets) for one in samples]


@torch.no_grad()
def measured(model, batches):
    """Loss summed over some batches, and the nll of every label in each row, in order."""
    loss, rows = 0.0, []
    for batch in batches:
        rest = {key: batch[key] for key in KEYS[2:]}
        output = model(batch["input_ids"], batch["labels"], **rest)
        loss += float(output.loss_sum)
        rows += output.nll.split((batch["labels"] != -100).sum(dim=1).tolist())
    return loss, rows


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_loss_equals_unpacked_loss(kind, dtype):
    model = shake(TinySeek(small_config(**MODELS[kind])), scale=0.2).to(dtype).eval()
    samples = readable(random_samples(30, 20, seed=3))
    packed, rows = measured(model, eval_chat_batches(samples, 32, 4, pad_id=PAD))
    alone, _ = measured(model, eval_chat_batches(samples, 32, 7, packing=False, pad_id=PAD))
    one_by_one = 0.0  # nothing but the dialogue: no padding, no masks
    for ids, targets in samples:
        labels = [one if target else -100 for one, target in zip(ids.tolist(), targets)][1:]
        one_by_one += model(torch.tensor([ids[:-1].tolist()]), torch.tensor([labels])).loss_sum.item()
    assert len(rows) < 15
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert packed == pytest.approx(one_by_one, rel=tolerance)
    assert alone == pytest.approx(one_by_one, rel=tolerance)


@pytest.mark.parametrize("kind", MODELS)
def test_dialogues_of_a_row_do_not_see_each_other(kind):
    """Changing one changes its own nll and nobody else's."""
    model = shake(TinySeek(small_config(**MODELS[kind])), scale=0.2).double().eval()
    samples = [
        sample(one.ids, [0] + [1] * (len(one.ids) - 1)) for one in readable(random_samples(4, 9, 5, 5))
    ]
    table = DialogueRows(samples, 40, True, PAD)
    _, (before,) = measured(model, [table.batch([[0, 1, 2, 3]])])
    for changed in range(4):
        others = list(samples)
        others[changed] = sample((samples[changed].ids - 7 + 13) % 54 + 7, samples[changed].targets)
        _, (after,) = measured(model, [DialogueRows(others, 40, True, PAD).batch([[0, 1, 2, 3]])])
        lengths = [len(one.ids) - 1 for one in samples]
        for number, (was, now) in enumerate(zip(before.split(lengths), after.split(lengths))):
            if number == changed:
                assert (was - now).abs().min() > 1e-6
            else:
                torch.testing.assert_close(was, now, rtol=0, atol=1e-12)


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_evaluation_sees_every_sample_once(packing, world, count):
    seen, rows = [], 0
    for rank in range(world):
        settings = {"rank": rank, "world_size": world, "packing": packing, "pad_id": PAD}
        batches = list(eval_chat_batches(SAMPLES[:count], 16, 3, **settings))
        rows += sum(len(batch["labels"]) for batch in batches)
        seen += names(batches)
    assert sorted(seen) == list(range(count)) and rows == count_eval_rows(SAMPLES[:count], 16, packing)
    assert packing or world > 1 or seen == list(range(count))


def test_a_short_evaluation_spreads_its_rows():
    (batch,) = eval_chat_batches(SAMPLES, 16, 4, max_batches=1, packing=False, pad_id=PAD)
    assert names([batch]) == [0, 10, 20, 30]
    settings = {"max_batches": 2, "world_size": 2, "packing": False, "pad_id": PAD}
    halves = [list(eval_chat_batches(SAMPLES, 16, 2, rank=rank, **settings)) for rank in (0, 1)]
    assert [len(half) for half in halves] == [2, 2]
    assert sorted(names(chain(*halves))) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert len(list(eval_chat_batches(SAMPLES, 16, 4, max_batches=1000, packing=False, pad_id=PAD))) == 10
