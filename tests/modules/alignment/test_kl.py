"""KL estimates against Schulman's published table and exact gradients."""

import pytest
import torch

from modules.alignment.kl import kl_estimate


@pytest.mark.parametrize("mean, true, table", [
    (0.1, 0.005, {"k1": (0, 20), "k2": (0.002, 1.42), "k3": (0, 1.42)}),
    (1.0, 0.5, {"k1": (0, 2), "k2": (0.25, 1.73), "k3": (0, 1.7)}),
])  # fmt: skip
def test_the_published_table(mean, true, table):
    """Bias and deviation over the true KL of N(0, 1) from N(mean, 1), as printed on
    joschu.net/blog/kl-approx.html; here by integration instead of sampling."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    policy = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(x)
    reference = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), 1.0).log_prob(x)
    density = policy.exp() / policy.exp().sum()
    for kind, (bias, deviation) in table.items():
        estimate = kl_estimate(policy, reference, kind)
        expected = (density * estimate).sum()
        spread = (density * (estimate - expected).square()).sum().sqrt()
        # The page shows what was sampled, to two or three digits: 0.002 is 0.0025, 1.7 is 1.72.
        assert abs((expected - true) / true - bias) < 6e-4, kind
        assert abs(spread / true - deviation) < 0.02 * deviation, kind


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_expected_gradient_as_a_loss(kind):
    """k1: none; k2: that of KL(policy, reference); k3: that of KL(reference, policy). Exact sums over 11
    tokens. No gradient reaches the reference."""
    torch.manual_seed(0)
    logits = torch.randn(11, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(11, dtype=torch.float64).log_softmax(0).requires_grad_()
    policy = logits.log_softmax(0)
    expected = (policy.detach().exp() * kl_estimate(policy, reference, kind)).sum()
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (against_reference,) = torch.autograd.grad(expected, reference, retain_graph=True, allow_unused=True)
    kl = torch.nn.functional.kl_div
    truth = {
        "k1": 0 * logits.sum(),
        "k2": kl(reference.detach(), policy, reduction="sum", log_target=True),
        "k3": kl(policy, reference.detach(), reduction="sum", log_target=True),
    }[kind]
    (true,) = torch.autograd.grad(truth, logits)
    torch.testing.assert_close(gradient, true, rtol=1e-10, atol=1e-14)
    assert against_reference is None


def test_small_differences_keep_their_digits():
    """k3 of fp32 log-probabilities 1e-3 apart is 5e-7: e^l - 1 would lose most of its digits."""
    apart = torch.full((1,), 1e-3)
    found = kl_estimate(-apart, torch.zeros(1), "k3").double()
    l = apart.double()
    # the rounding of expm1(l), of the size of l, against l^2 / 2
    assert abs(found / (l.exp() - 1 - l) - 1) < 2**-24 * 1e-3 / 5e-7
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(apart, apart, kind).any()
