"""The order of items, and rows of different lengths, against PyTorch's own padding."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from load_data.items import ItemLoader, padded


class Loader(ItemLoader):
    """A loader whose batches are the indices themselves."""

    def batch(self, chosen):
        return chosen.tolist()


def epochs(seed, count=12):
    """The orders of two epochs, in steps of two batches of three."""
    loader = Loader(count, 3, 2, seed=seed)
    items = [one for _ in range(4) for batch in loader.next_step() for one in batch]
    return items[:count], items[count:]


def test_each_epoch_visits_every_item_once_in_an_order_of_its_own():
    first, second = epochs(seed=0)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second != epochs(seed=1)[1] and first != epochs(seed=1)[0]
    assert epochs(seed=0) == (first, second)


def test_rows_are_padded_as_in_pytorch():
    rows = [[5, 6, 7], np.array([8], dtype=np.int32), [], [1, 2]]
    ids, there = padded(rows, fill=-9)
    expected = [torch.tensor(np.asarray(row, dtype=np.int64)) for row in rows]
    assert torch.equal(ids, pad_sequence(expected, batch_first=True, padding_value=-9))
    assert there.sum(dim=1).tolist() == [3, 1, 0, 2] and torch.equal(ids != -9, there)
    assert padded([[], []], 3)[0].tolist() == [[3], [3]]  # one column at least
