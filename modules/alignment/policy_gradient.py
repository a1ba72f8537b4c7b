"""The policy-gradient loss in three pieces: the ratio, its clip, and what is averaged.

logprobs (B, T) are the log-probabilities of the sampled tokens under the policy, old (B, T) those under the
policy that sampled them, A (B, T) the advantages. The last two are constants.

    log ratio   token      l_t = logprobs_t - old_t
                sequence   l_t = mean over the row's tokens of that          GSPO, arXiv 2507.18071

    clip        none       -r_t A_t                                          r_t = exp(l_t)
                ppo        -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)   PPO, arXiv 1707.06347
                cispo      -sg(min(r_t, high)) A_t logprobs_t                arXiv 2506.13585
    no ratio               -A_t logprobs_t                                   REINFORCE

    average     sequence   mean over rows of the mean over their tokens      GRPO, arXiv 2402.03300
                token      mean over all tokens of the step                  DAPO, arXiv 2503.14476
                constant   sum of all tokens / (rows * longest allowed)      Dr. GRPO, arXiv 2503.20783

`clip=ppo` with high > low is DAPO's clip-higher. sg stops the gradient: CISPO bounds the weight of a token
and keeps its gradient, while PPO drops the token. The average is taken over all micro-batches and processes
of a step: `aggregated` returns a sum, to be divided by the sum of `weight_of`.

Traps: under the mean over the row, each token of a long wrong answer is pushed down less than one of a short
wrong answer, so wrong answers grow. And at the first update r is exactly 1: the loss is then -A on average,
near 0 in every group, though its gradient is not.
"""

import torch


def log_ratio(logprobs, old, mask, kind):
    """Return the log of policy / old policy, by token or by sequence, 0 outside the mask. (B, T) each."""
    difference = (logprobs - old.detach()).where(mask, 0)
    if kind == "token":
        return difference
    mean = difference.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return mean.expand_as(difference).where(mask, 0)


def objective(logprobs, ratio_log, advantages, recipe):
    """Return the loss of each token (B, T), and True (B, T) where the clip takes hold.

    `recipe` names the clip and its bounds (config/rl.py). Without a ratio, `ratio_log` is not used.
    """
    A = advantages.detach()
    if recipe.ratio == "none":
        return -A * logprobs, torch.zeros_like(A, dtype=torch.bool)
    ratio = ratio_log.exp()
    if recipe.clip == "cispo":
        weight = ratio.detach().clamp(max=recipe.clip_high)
        return -weight * A * logprobs, ratio.detach() > recipe.clip_high
    if recipe.clip == "none":
        return -ratio * A, torch.zeros_like(A, dtype=torch.bool)
    low, high = 1 - recipe.clip_low, 1 + recipe.clip_high
    clipped = torch.where(A > 0, ratio.detach() > high, (ratio.detach() < low) & (A < 0))
    return -torch.min(ratio * A, ratio.clamp(low, high) * A), clipped


def aggregated(per_token, mask, kind):
    """Sum per_token (B, T) over the mask, each row by its own length if kind is `sequence`. Returns ()."""
    rows = per_token.where(mask, 0).sum(dim=1)  # (B,)
    return (rows / mask.sum(dim=1).clamp(min=1) if kind == "sequence" else rows).sum()


def weight_of(mask, kind, max_new_tokens) -> float:
    """Return what the sum of `aggregated` is divided by; weights of micro-batches add up. mask (B, T)."""
    if kind == "token":
        return float(mask.sum())
    rows = float(mask.any(dim=1).sum())
    return rows * max_new_tokens if kind == "constant" else rows


def lesson():
    """Print the length bias of each average, and which tokens each clip silences."""
    from config.rl import Recipe

    lengths, T = torch.tensor([4, 32]), 32
    mask = torch.arange(T) < lengths[:, None]  # two wrong answers, short and long
    print("force that pushes one token down, in a wrong answer of 4 and in one of 32 tokens")
    for kind in ("sequence", "token", "constant"):
        logprobs = torch.zeros(2, T, requires_grad=True)
        (aggregated(logprobs, mask, kind) / weight_of(mask, kind, T)).backward()
        short, long = logprobs.grad[:, 0].tolist()
        print(f"  {kind:9s} {short:.4f} {long:.4f}   the long one is spared by {short / long:.0f}")

    print("\nfactor on the gradient of a token's log-probability, by ratio, for A = +1 | A = -1")
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.25, 2.0, 8.0])
    print(" " * 16 + "   ".join(f"r = {ratio:<9.2f}" for ratio in ratios.tolist()))
    for name, high in (("none", 0), ("ppo", 0.2), ("ppo", 0.28), ("cispo", 5.0)):
        gradients = []
        for A in (1.0, -1.0):
            logprobs = ratios.log().requires_grad_()
            recipe = Recipe("mean", clip=name, clip_high=high)
            objective(logprobs, logprobs - 0, torch.full_like(ratios, A), recipe)[0].sum().backward()
            gradients.append(0 - logprobs.grad)
        cells = "   ".join(f"{up:+.2f} | {down:+.2f}" for up, down in zip(*gradients, strict=True))
        print(f"  {name:6s}{high:6} {cells}")


if __name__ == "__main__":
    lesson()
