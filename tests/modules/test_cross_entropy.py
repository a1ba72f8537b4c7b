"""The chunked loss against `F.cross_entropy` and autograd over all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules import cross_entropy
from modules.cross_entropy import CHUNK, linear_cross_entropy, plain_cross_entropy, soft_cap

C, V = 12, 29


def sample(N, dtype=torch.float64, ignored=0.3):
    torch.manual_seed(N)
    labels = torch.where(torch.rand(N) < ignored, -100, torch.randint(0, V, (N,)))
    return torch.randn(N, C).to(dtype).requires_grad_(), torch.randn(V, C).to(dtype).requires_grad_(), labels


def by_torch(hidden, weight, labels, cap):
    """The textbook, in the words of PyTorch; the cap as Gemma 2 has it."""
    logits = hidden @ weight.T
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize(
    "N, ignored", [(1, 0), (1, 1), (7, 0.3), (7, 1), (CHUNK, 0), (CHUNK + 1, 0), (2 * CHUNK + 77, 0.4)]
)
def test_value_and_gradients(N, ignored, cap):
    hidden, weight, labels = sample(N, ignored=ignored)
    expected = by_torch(hidden, weight, labels, cap)
    real = torch.autograd.grad(2.5 * expected, (hidden, weight))
    for form in (linear_cross_entropy, plain_cross_entropy):
        total, nll = form(hidden, weight, labels, cap)
        torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-12)
        assert total.dtype == torch.float64 and not nll.requires_grad
        torch.testing.assert_close(nll.sum(), expected.detach(), rtol=1e-13, atol=1e-12)
        for a, b in zip(torch.autograd.grad(2.5 * total, (hidden, weight)), real, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_each_tokens_loss_in_order():
    hidden, weight, labels = sample(CHUNK + 40)
    rows = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    _, nll = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(nll, rows[labels != -100].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_label_whose_probability_underflows(dtype):
    """exp(-500) is 0 in fp32; its loss is 500 all the same, and a certain label's is 0."""
    logits = torch.tensor([[0.0, -500.0, -3.0], [1000.0, 0.0, 1000.0], [0.0, -500.0, -3.0]])
    labels = torch.tensor([1, 0, 0])
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    hidden = logits.to(dtype).requires_grad_()
    total, nll = linear_cross_entropy(hidden, torch.eye(3, dtype=dtype), labels)
    torch.testing.assert_close(nll.double(), expected, rtol=2e-7, atol=1e-7)  # the rounding of fp32
    (grad,) = torch.autograd.grad(total, hidden)
    exact = logits.double().softmax(-1) - F.one_hot(labels, 3)
    torch.testing.assert_close(grad.double(), exact, rtol=0, atol=4e-3 if dtype == torch.bfloat16 else 1e-7)


def test_no_label_at_all_costs_nothing():
    hidden, weight, _ = sample(5)
    total, nll = linear_cross_entropy(hidden, weight, torch.full((5,), -100))
    total.backward()
    assert total.item() == 0 and len(nll) == 0
    assert not hidden.grad.any() and not weight.grad.any() and hidden.grad.shape == hidden.shape


def test_rows_without_a_label_are_left_alone_whatever_they_hold():
    """The head's products of supervised rows only: loss and gradient of the whole, even beside NaN and
    infinity."""
    hidden, weight, labels = sample(9, ignored=0)
    labels[3:6] = -100
    clean = linear_cross_entropy(hidden, weight, labels)[0]
    expected = torch.autograd.grad(clean, (hidden, weight))
    real = torch.autograd.grad(by_torch(hidden, weight, labels, None), (hidden, weight))
    spoiled = hidden.detach().clone()
    spoiled[3], spoiled[4] = torch.nan, torch.inf
    spoiled.requires_grad_()
    total = linear_cross_entropy(spoiled, weight, labels)[0]
    assert torch.equal(total, clean)
    for a, b, c in zip(torch.autograd.grad(total, (spoiled, weight)), expected, real, strict=True):
        assert torch.equal(a, b) and not a[3:6].any() if a.shape == hidden.shape else torch.equal(a, b)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-12)


def test_products_have_few_sizes_however_many_rows_have_a_label():
    """On a CPU each size is compiled and kept: 350 MiB after 150 batches of dialogues."""
    sizes = set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.mm:
                sizes.update(tuple(part.shape) for part in args[:2])
            return function(*args, **(kwargs or {}))

    with Note():
        for N in range(1, 2 * CHUNK, 5):
            linear_cross_entropy(*sample(N, ignored=0))
    rows = {size for shape in sizes for size in shape} - {C, V}
    assert len(rows) == CHUNK // cross_entropy.MULTIPLE and max(rows) == CHUNK


def test_a_tied_weight_gathers_both_gradients():
    """Embedding and head are one tensor: its gradient is the sum of the two uses."""
    torch.manual_seed(0)
    ids, labels = torch.randint(0, V, (11,)), torch.randint(0, V, (11,))
    table = torch.randn(V, C, dtype=torch.float64)
    grads = []
    for form in (linear_cross_entropy, lambda h, w, t: (by_torch(h, w, t, None), None)):
        weight = table.clone().requires_grad_()
        form(F.embedding(ids, weight).tanh(), weight, labels)[0].backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_by_finite_differences(cap, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 2)
    hidden, weight, labels = sample(5, ignored=0)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, cap)[0], (hidden, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_may_be_frozen(frozen):
    hidden, weight, labels = sample(6)
    inputs = [hidden, weight]
    expected = torch.autograd.grad(by_torch(*inputs, labels, None), inputs[1 - frozen])[0]
    inputs[frozen] = inputs[frozen].detach()
    total, _ = linear_cross_entropy(*inputs, labels)
    torch.testing.assert_close(
        torch.autograd.grad(total, inputs[1 - frozen])[0], expected, rtol=0, atol=1e-12
    )
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), labels)[0].requires_grad


@pytest.mark.parametrize("cap", [None, 4.0])
def test_under_autocast(cap):
    """Products in bf16, softmax in fp32: as near to the exact loss as PyTorch's own way under autocast is."""
    hidden, weight, labels = sample(3 * CHUNK + 5, torch.float32)
    exact = by_torch(hidden.double(), weight.double(), labels, cap)
    real = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours, nll = linear_cross_entropy(hidden, weight, labels, cap)
        plain, _ = plain_cross_entropy(hidden, weight, labels, cap)
    assert ours.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)
    torch.testing.assert_close(plain.double(), exact, rtol=2e-3, atol=0)
    for a, b, c in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), real
    ):
        assert a.dtype == torch.float32
        assert (a - c).norm() / c.norm() < 0.01 and (b - c).norm() / c.norm() < 0.01


def test_an_evaluation_pays_for_no_gradient(monkeypatch):
    """Under no_grad a weight still says that it wants a gradient; none may be computed."""
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: products.append(1) or real(*args, **kw))
    hidden, weight, labels = sample(8, ignored=0)
    head = nn.Parameter(weight.detach())
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden.requires_grad_(), head, labels)[0]
    assert not products and not evaluated.requires_grad
    trained = linear_cross_entropy(hidden, head, labels)[0]
    assert products and torch.equal(evaluated, trained)


def test_a_second_derivative_is_refused_rather_than_wrong():
    hidden, weight, labels = sample(4)
    total = linear_cross_entropy(hidden, weight, labels)[0] ** 2
    (grad,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_cap():
    x = torch.tensor([-1000.0, -0.01, 0.0, 0.01, 30.0, 1000.0])
    assert soft_cap(x, None) is x
    capped = soft_cap(x, 30.0)
    assert capped.abs().max() <= 30 and capped[4].item() == pytest.approx(30 * 0.7615942, rel=1e-6)  # tanh(1)
    torch.testing.assert_close(capped[1:4], x[1:4], rtol=1e-5, atol=0)
