"""Packed stores: what they hold, byte by byte, and the way back."""

import pytest
import torch

from config.quant import QuantConfig
from modules.quantized import integers
from modules.quantized.stored import StoredIntegers, StoredNF4, empty_store

FORMS = {  # settings, bytes of a stack (3, 4, 24): 288 numbers in 12 rows of 24
    "int8": ({"method": "rtn"}, 288 + 12 * 4),
    "int8, groups, zeros": ({"method": "rtn", "group_size": 6, "symmetric": False}, 288 + 48 * (2 + 1)),
    "int4, whole rows": ({"method": "rtn", "bits": 4}, 144 + 12 * 4),
    "int4, groups": ({"method": "gptq", "bits": 4, "group_size": 8}, 144 + 36 * 2),
    "int4, zeros": ({"method": "awq", "bits": 4, "group_size": 12, "symmetric": False}, 144 + 24 * (2 + 1)),
    "NF4": ({"method": "nf4", "bits": 4}, 144 + 5 * 4),
    "NF4, double": ({"method": "nf4", "bits": 4, "double_quant": True}, 144 + 5 + 4 + 4),
}


def weight(shape=(3, 4, 24)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_filled_from_a_state_dict(form):
    """Bit for bit, strictly, at the size that the format promises; no number is a parameter."""
    settings, size = form
    store = empty_store((3, 4, 24), QuantConfig(**settings))
    empty = {name: (buffer.shape, buffer.dtype) for name, buffer in store.named_buffers()}
    store.round(weight())
    assert empty == {name: (buffer.shape, buffer.dtype) for name, buffer in store.named_buffers()}
    assert sum(buffer.untyped_storage().nbytes() for buffer in store.state_dict().values()) == size
    other = empty_store((3, 4, 24), QuantConfig(**settings))
    other.load_state_dict(store.state_dict())
    found = other.dequantize()
    assert found.shape == (3, 4, 24) and found.dtype == torch.float32 and not list(store.parameters())
    assert torch.equal(found, store.dequantize()) and (found - weight()).norm() < 0.2 * weight().norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_of_four_bits(symmetric):
    """Each number by hand from its half of a byte, its group's scale and zero."""
    store = StoredIntegers((2, 8), 4, 4, symmetric).round(weight((2, 8)))
    found = store.dequantize()
    for row in range(2):
        for i in range(8):
            byte, scale = int(store.codes[row, i // 2]), float(store.scales[row, i // 4])
            code = byte // 16 if i % 2 == 0 else byte % 16
            zero = 8 if symmetric else int(store.zeros[row, i // 4])
            assert abs(float(found[row, i]) - scale * (code - zero)) <= 2**-23 * abs(scale * 16)  # fp32


def test_codes_belong_to_their_scales():
    codes = integers.quantize(weight((2, 8)), 4, 4)
    with pytest.raises(ValueError, match="scales in torch.float32, stored in torch.float16"):
        StoredIntegers((2, 8), 4, 4).put(*codes)


def test_shapes_that_do_not_fit():
    for arguments, message in (
        (((2, 10), 4, 4), "groups of 4 do not divide rows of 10"),
        (((2, 9), 4, 3), "groups of 2 do not divide rows of 9"),  # bytes
        (((2, 9), 4), "groups of 2 do not divide rows of 9"),
    ):
        with pytest.raises(ValueError, match=message):
            StoredIntegers(*arguments)
    with pytest.raises(ValueError, match="15 numbers do not fill whole bytes"):
        StoredNF4((3, 5))
