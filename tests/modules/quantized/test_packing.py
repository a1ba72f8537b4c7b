"""Two codes in a byte."""

import pytest
import torch

from modules.quantized.packing import pack, unpack


def test_all_pairs():
    """Each of the 256 bytes is 16 times the first code plus the second, at any dtype of codes."""
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).flatten()
    for dtype in (torch.uint8, torch.int8, torch.int64):
        packed = pack(pairs.to(dtype))
        assert packed.dtype == torch.uint8 and packed.tolist() == list(range(256))
    assert torch.equal(unpack(packed), pairs.to(torch.uint8))


def test_stacks_and_odd_numbers():
    codes = torch.randint(16, (3, 2, 6), generator=torch.Generator().manual_seed(0))
    assert pack(codes).shape == (3, 2, 3) and torch.equal(unpack(pack(codes)).long(), codes)
    with pytest.raises(ValueError, match="5 codes do not fill whole bytes"):
        pack(torch.zeros(2, 5))
