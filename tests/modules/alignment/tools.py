"""Random masks of answers with awkward shapes."""

import torch


def random_mask(generator, rows=7, width=9, holes=True):
    """(rows, width): answers of random length from a random start, one of them a single token."""
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row in range(rows):
        first = int(torch.randint(0, width, (), generator=generator))
        last = first + 1 if row == 1 else int(torch.randint(first + 1, width + 1, (), generator=generator))
        mask[row, first:last] = True
        if holes and last - first > 3:
            mask[row, first + 1] = False  # as the output of a tool
    return mask


def fp64(generator, *shape, scale=1.0):
    """Random normal numbers."""
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
