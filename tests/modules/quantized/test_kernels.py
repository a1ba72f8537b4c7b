"""Products with quantised matrices against fp64 products of what the codes stand for."""

import pytest
import torch

from modules.quantized import kernels
from modules.quantized.kernels import HalfProduct, Int4Product, Int8Product, PlainProduct, fast_product, sound
from modules.quantized.stored import StoredIntegers, StoredNF4


@pytest.fixture(autouse=True)
def fresh_checks():
    """Other operators are tried out below."""
    sound.cache_clear()
    yield
    sound.cache_clear()


def integers(rows, width, bits, group=None, symmetric=True, seed=0):
    """A store of random codes, all of them possible, and the matrix that they stand for in fp64."""
    generator = torch.Generator().manual_seed(seed)
    low, steps = -(2 ** (bits - 1)) if symmetric else 0, 2**bits
    codes = torch.randint(low, low + steps, (rows, width), generator=generator)
    scales = torch.rand(rows, width // (group or width), generator=generator) + 0.1
    store = StoredIntegers((rows, width), bits, group, symmetric)
    scales = scales.to(store.scale_dtype)
    zeros = None if symmetric else torch.randint(0, steps, scales.shape, generator=generator)
    kinds = (torch.int8, None) if symmetric else (torch.uint8, torch.uint8)
    store.put(codes.to(kinds[0]), scales, None if symmetric else zeros.to(kinds[1]))
    exact = torch.empty(rows, width, dtype=torch.float64)
    for column in range(width):
        part = column // (group or width)
        zero = 0 if symmetric else zeros[:, part]
        exact[:, column] = scales[:, part].double() * (codes[:, column] - zero)
    return store, exact


FORMATS = {
    "int8": ((48, 96, 8), Int8Product),
    "int8, odd": ((37, 71, 8), Int8Product),
    "int8, one row": ((1, 5, 8), Int8Product),
    "int8, groups": ((48, 96, 8, 32), HalfProduct),
    "int8, zeros": ((48, 96, 8, None, False), HalfProduct),
    "int4, groups of 32": ((48, 96, 4, 32), Int4Product),
    "int4, groups of 64, zeros": ((32, 192, 4, 64, False), Int4Product),
    "int4, groups of 96": ((32, 192, 4, 96), Int4Product),
    "int4, groups of 512": ((16, 1024, 4, 512), Int4Product),
    "int4, whole rows": ((32, 128, 4), Int4Product),
    "int4, groups of 16": ((32, 128, 4, 16), HalfProduct),
    "int4, odd": ((37, 70, 4), HalfProduct),
}


def check(found, x, exact, kind, factor=1.0):
    """Each number may differ by `kind.error` of what all roundings in its row could add up to."""
    bound = x.double().abs().amax(1, True) * exact.abs().sum(1) * kind.error * factor
    assert found.dtype == torch.float32
    assert ((found.double() - x.double() @ exact.T).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_exact_product(name):
    """The inputs include a row of zeros, one of tiny numbers, and one with an outlier."""
    shape, kind = FORMATS[name]
    store, exact = integers(*shape)
    product = fast_product([store])
    assert type(product) is kind
    for M in (1, 3, 16):
        x = torch.randn(M, shape[1], generator=torch.Generator().manual_seed(M))
        x[-1] *= 1e-12
        x[M // 2, 0] = 50.0
        x = torch.cat([x, torch.zeros(1, shape[1])]) if M == 3 else x
        check(product(x), x, exact, kind)


@pytest.mark.parametrize("kind", [Int8Product, Int4Product, HalfProduct])
def test_is_as_exact_as_its_numbers(kind):
    """The relative error of random rows: 24 bits for int8, 8 for bf16, 11 for fp16."""
    shape = {Int8Product: (64, 256, 8), Int4Product: (64, 256, 4, 32), HalfProduct: (64, 256, 8, 32)}[kind]
    store, exact = integers(*shape)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ exact.T
    error = (fast_product([store])(x).double() - expected).norm() / expected.norm()
    assert error < {Int8Product: 2.0**-18, Int4Product: 2.0**-7, HalfProduct: 2.0**-11}[kind]


@pytest.mark.parametrize("code, sign", [(-128, 1.0), (-128, -1.0), (127, 1.0), (127, -1.0)])
def test_sums_of_the_largest_numbers_fit(code, sign):
    """fbgemm adds pairs of products in 16 bits on processors without VNNI."""
    store = StoredIntegers((16, 300), 8).put(torch.full((16, 300), code, dtype=torch.int8), torch.ones(16, 1))
    x = torch.full((2, 300), sign)
    x[1, ::2] = -sign * 0.999
    check(fast_product([store])(x), x, torch.full((16, 300), float(code), dtype=torch.float64), Int8Product)


def test_products_that_do_not_fit_would_be_cut():
    """The trap itself, where the processor has it: eight bits by eight bits, as PyTorch multiplies them."""
    product = Int8Product(kernels.joined_codes([integers(16, 64, 8)[0]], None))
    full = torch.full((1, 64), 127.0)
    store = StoredIntegers((16, 64), 8).put(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16, 1))
    packed = Int8Product(kernels.joined_codes([store], None)).packed
    wrong = product.multiply(full, 1.0, 128, packed)[0, 0].item() != 127 * 127 * 64
    if not wrong:
        pytest.skip("this processor adds in 32 bits")
    assert fast_product([store])(full)[0, 0].item() == pytest.approx(127 * 127 * 64, rel=2**-18)


def test_stores_side_by_side_and_experts():
    """Matrices with the same input are one product; an expert is a slice of a stack. NF4 has no columns."""
    (one, left), (two, right) = integers(16, 64, 4, 32, False), integers(32, 64, 4, 32, False, seed=1)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    check(fast_product([one, two])(x), x, torch.cat([left, right]), Int4Product)
    stack = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    for store in (StoredIntegers(stack.shape, 8), StoredIntegers(stack.shape, 4, 32), StoredNF4(stack.shape)):
        weights = store.round(stack).dequantize().double()
        for expert in range(3):
            product = fast_product([store], expert)
            check(product(x), x, weights[expert], type(product))


def test_formats_that_differ_are_joined_in_fp16():
    (one, left), (two, right) = integers(16, 64, 8), integers(16, 64, 4, 32)
    product = fast_product([one, two])
    assert type(product) is HalfProduct
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    check(product(x), x, torch.cat([left, right]), HalfProduct)


def test_tiny_and_huge_weights_survive_fp16():
    weight = torch.tensor([[1e-12, -3e-12], [1e9, 2e9], [0.0, 0.0]])
    x = torch.tensor([[1.0, 2.0]])
    found = HalfProduct(weight)(x)
    torch.testing.assert_close(found, x @ weight.T, rtol=2**-10, atol=0)


def missing(*arguments):
    raise RuntimeError("this build has no such operator")


@pytest.mark.parametrize("gone, kinds", [
    ((), (Int8Product, Int4Product, HalfProduct)),
    (("linear_prepack",), (HalfProduct, Int4Product, HalfProduct)),
    (("linear_prepack", "linear_prepack_fp16"), (PlainProduct, Int4Product, PlainProduct)),
])  # fmt: skip
def test_an_operator_that_is_missing(monkeypatch, gone, kinds):
    """The next best form is taken, and is right."""
    for name in gone:
        monkeypatch.setattr(torch.ops.quantized, name, missing)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    engine = torch.backends.quantized.engine
    for shape, kind in zip(((16, 64, 8), (16, 64, 4, 32), (16, 64, 8, 32)), kinds, strict=True):
        store, exact = integers(*shape)
        product = fast_product([store])
        assert type(product) is kind
        check(product(x), x, exact, {PlainProduct: Int8Product}.get(kind, kind))
    assert torch.backends.quantized.engine == engine


def test_an_operator_that_is_wrong(monkeypatch):
    """One whose sums overflow is found out before it is used."""
    right = Int8Product.__call__
    monkeypatch.setattr(Int8Product, "__call__", lambda self, x: right(self, x).clamp(-8000, 8000))
    assert not sound(Int8Product)
    assert type(fast_product([integers(16, 64, 8)[0]])) is HalfProduct


def test_the_check_leaves_the_random_state():
    state = torch.get_rng_state()
    assert all(sound(kind) for kind in (Int8Product, Int4Product, HalfProduct))
    assert torch.equal(torch.get_rng_state(), state)
