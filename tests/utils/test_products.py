"""The library of fp32 products: measured once, exact, and the same for all runs of a processor."""

import pytest
import torch

from utils import products
from utils.products import MKL, ONEDNN, choose_products, faster_library, is_exact, multiply_with


def test_the_first_choice_is_kept(tmp_path, monkeypatch):
    """Whatever a second measurement would say, also if another process has finished in the meantime."""
    monkeypatch.setattr(products, "faster_library", lambda: ONEDNN)
    assert choose_products(tmp_path / "cache") == ONEDNN
    monkeypatch.setattr(products, "faster_library", lambda: MKL)
    assert choose_products(tmp_path / "cache") == ONEDNN

    def slower():  # the other process writes while this one measures
        (tmp_path / f"products_{products.processor_key()}.txt").write_text(ONEDNN)
        return MKL

    monkeypatch.setattr(products, "faster_library", slower)
    assert choose_products(tmp_path) == ONEDNN
    assert not list(tmp_path.rglob("*.tmp"))


def test_each_processor_has_a_choice_of_its_own(monkeypatch):
    """So has each limit of its instruction set, and each number of threads."""
    keys = {products.processor_key()}
    for limit in ("AVX2", "AVX512_CORE"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        keys.add(products.processor_key())
    assert len(keys) == 3


CASES = [(2.0, True, ONEDNN), (1.1, True, MKL), (2.0, False, MKL)]


@pytest.mark.parametrize(("gain", "exact", "choice"), CASES)
def test_the_choice_needs_a_clear_gain_and_all_digits(monkeypatch, gain, exact, choice):
    """A gain near 1 is noise; a library that rounds to bf16 is no choice for fp32."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "gains", lambda: [gain] * 3)
    monkeypatch.setattr(products, "is_exact", lambda library: exact)
    assert faster_library() == choice


def test_rounding_to_bf16_is_noticed():
    """Under autocast the same product runs in bf16."""
    assert is_exact(MKL)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_exact(MKL)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("shape", [(1, 7, 5), (64, 300, 33), (2, 1, 129)])
def test_both_libraries_are_right(shape):
    """Sums of n products of fp32 numbers are right to n roundings, in both; afterwards all is as before."""
    n, i, o = shape
    x, weight, start = torch.randn(3, n, i), torch.randn(3, o, i), torch.randn(n, o)
    most = i * 2.0**-24 * (x.double().abs() @ weight.double().abs().mT).max()
    before = torch.backends.mkldnn.matmul.fp32_precision
    for library in (MKL, ONEDNN) if is_exact(ONEDNN) else (MKL,):
        with pytest.raises(KeyError), multiply_with(library):
            assert (torch.bmm(x, weight.mT) - x.double() @ weight.double().mT).abs().max() <= most
            one = torch.addmm(start, x[0], weight[0].T) - (start + x[0].double() @ weight[0].double().T)
            assert one.abs().max() <= most + 2.0**-22 * start.abs().max()
            raise KeyError
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_real_turns_give_real_times():
    """The measurement itself runs."""
    assert len(products.gains()) == products.TURNS and min(products.gains()) > 0
