"""PPO's value loss: the critic learns the return of each token, in steps of bounded size.

    v' = old + clip(v - old, -c, c)       loss_t = max((v_t - R_t)^2, (v'_t - R_t)^2) / 2

v (B, T) is the critic's value now, old (B, T) its value before the updates on this rollout, R (B, T) the
return (modules/alignment/advantage.py). The larger of the two errors counts, so a value that has moved more
than c towards its return gets no gradient, and one that has moved away keeps its gradient back. Without a
clip the loss is a regression, whose solution is the mean return.

    values, old, returns (B, T) -> loss (B, T)

Trap: the critic sees one noisy return for each token. Without a bound, several updates on one rollout learn
that noise by heart.

Paper: PPO, arXiv 1707.06347 (the clip of the value is in OpenAI's code; see arXiv 2006.05990 for its effect).
"""

import torch


def value_loss(values, old, returns, clip):
    """Return the clipped loss of each token. values, old, returns (B, T) -> (B, T)."""
    old, returns = old.detach(), returns.detach()
    clipped = old + (values - old).clamp(-clip, clip)
    return torch.max((values - returns).square(), (clipped - returns).square()) / 2


def lesson():
    """Print where the clip lets a value go in many updates on one rollout."""
    print("a value starts at 0.50; its one sampled return is 1, but half of all returns are 0")
    for clip in (0.05, 0.2, 10.0):
        value = torch.tensor([[0.5]], requires_grad=True)
        returns, seen = torch.ones(1, 1), []
        for _ in range(20):
            value_loss(value, torch.full((1, 1), 0.5), returns, clip).sum().backward()
            with torch.no_grad():
                value -= 0.1 * value.grad
            value.grad = None
            seen.append(f"{value.item():.2f}")
        print(f"  clip {clip:5.2f}: after 1, 2, 5, 20 updates", *[seen[i - 1] for i in (1, 2, 5, 20)])

    print("\ngradient at values on both sides of old = 0.50, for a return of 1 and a clip of 0.2")
    value = torch.tensor([[0.1, 0.4, 0.6, 0.69, 0.71, 0.9, 1.1]], requires_grad=True)
    value_loss(value, torch.full_like(value, 0.5), torch.ones_like(value), 0.2).sum().backward()
    for v, gradient in zip(value[0].tolist(), value.grad[0].tolist(), strict=True):
        print(f"  value {v:.2f}   gradient {gradient:+.2f}")


if __name__ == "__main__":
    lesson()
