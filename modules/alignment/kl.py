"""Estimate the distance KL(policy, reference) from the sampled tokens alone.

The exact distance is a sum over the vocabulary at every token. Three estimates need only the
log-probabilities of the sampled token x ~ policy, with l = log reference(x) - log policy(x) (J. Schulman,
"Approximating KL Divergence", joschu.net/blog/kl-approx.html):

    k1 = -l               unbiased; noisy, often negative
    k2 = l^2 / 2          biased, quiet
    k3 = e^l - 1 - l      unbiased, quiet, never negative

    logprobs, reference (B, T) -> (B, T), with gradient through logprobs

Trap: an unbiased value need not have the right gradient. As a loss, k1 has an expected gradient of 0 (the
score function has mean 0), k2 that of KL(policy, reference), k3 that of KL(reference, policy)
(arXiv 2506.09477). In the reward, as a constant per token, k1 is the right choice: the policy gradient then
brings in the derivative of the sampling.
"""

import torch


def kl_estimate(logprobs, reference, kind):
    """Return the estimate of each token. logprobs, reference (B, T) -> (B, T)."""
    log_odds = reference.detach() - logprobs
    if kind == "k1":
        return -log_odds
    if kind == "k2":
        return log_odds.square() / 2
    return torch.expm1(log_odds) - log_odds  # expm1: e^l - 1 loses all digits of a small l


def lesson():
    """Print value and spread of each estimate beside the truth, and what each is worth as a loss."""
    torch.manual_seed(0)
    V, N = 8, 200_000
    reference = torch.randn(V, dtype=torch.float64).log_softmax(-1)
    logits = (reference + 0.6 * torch.randn(V, dtype=torch.float64)).requires_grad_()
    policy = logits.log_softmax(-1)
    true = (policy.exp() * (policy - reference)).sum()
    other = (reference.exp() * (reference - policy)).sum()
    (reverse,) = torch.autograd.grad(true, logits, retain_graph=True)
    (forward,) = torch.autograd.grad(other, logits, retain_graph=True)
    x = torch.multinomial(policy.detach().exp(), N, replacement=True)
    print(f"KL(policy, reference) = {true:.4f}; its estimates from {N:,} sampled tokens, their gradient as a")
    print("loss, and how far that is from the gradients of KL(policy, reference) and KL(reference, policy)")
    for kind in ("k1", "k2", "k3"):
        estimates = kl_estimate(policy[x], reference[x], kind)
        (gradient,) = torch.autograd.grad(estimates.mean(), logits, retain_graph=True)
        off = [(gradient - truth).norm() / truth.norm() for truth in (reverse, forward)]
        print(f"  {kind}: mean {estimates.mean():.4f}, deviation {estimates.std():.4f}, lowest "
              f"{estimates.min():+.2f}   gradient norm {gradient.norm():.3f}, off by {off[0]:4.0%} and "
              f"{off[1]:4.0%}")  # fmt: skip


if __name__ == "__main__":
    lesson()
