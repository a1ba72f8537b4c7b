"""The critic's clipped loss against torchrl and the paper's cases."""

import torch

from modules.alignment.value_loss import value_loss
from tests.modules.alignment.oracles import torchrl_value_loss
from tests.modules.alignment.tools import fp64


def test_value_and_gradient_equal_torchrl():
    generator = torch.Generator().manual_seed(0)
    old, returns = fp64(generator, 5, 7).requires_grad_(), fp64(generator, 5, 7).requires_grad_()
    values = (old.detach() + fp64(generator, 5, 7, scale=0.3)).requires_grad_()
    ours = value_loss(values, old, returns, 0.2)
    theirs = torchrl_value_loss(values, old.detach(), returns.detach(), 0.2)
    torch.testing.assert_close(2 * ours, theirs, rtol=1e-12, atol=0)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), values)
    ours.sum().backward()
    torch.testing.assert_close(2 * values.grad, their_gradient, rtol=1e-12, atol=0)
    assert old.grad is None and returns.grad is None
    assert not values.grad.all(), "the clip must have stopped some"


def test_a_value_that_moved_away_is_pulled_back():
    values = torch.tensor([0.0, 0.9], requires_grad=True)  # away from, and towards, the return by 0.5
    value_loss(values, torch.full((2,), 0.4), torch.ones(2), 0.2).sum().backward()
    assert values.grad.tolist() == [-1.0, 0.0]
