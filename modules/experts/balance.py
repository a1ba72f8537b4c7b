"""Balance losses that keep experts equally busy, and the router z-loss.

A router that prefers an expert sends it tokens, the expert improves on them, and the router prefers it more.
Without a remedy, a few experts end up with all the work. Two shares per expert measure that:

    f_i = assignments of expert i / all assignments       adds up to 1, has no gradient
    P_i = mean over tokens of  s_i / sum_j s_j            adds up to 1, has a gradient

A loss makes them even (E experts, K per token, s = sigmoid or softmax of the router's logits):

                hard                                       soft
    switch      E * sum_i f_i P_i                          E * sum_i P_i P_i          1 when even, for any K
    kl          KL(f, 1/E) = sum_i f_i ln(E f_i)           KL(P, 1/E)                 0 when even

`switch hard` is the usual one: f says which expert has too much, and the gradient lowers its P. `kl hard`
asks for even counts and nothing else. A count alone has no gradient, since it does not change when the router
changes a little; the straight-through estimate takes the value of f and the gradient that f would have if it
were P. The soft forms have a gradient by themselves, but can be low while the counts are uneven:
probabilities of 0.51 and 0.49 are nearly even, and send all tokens to the first expert.

    z-loss = mean over tokens of logsumexp(logits)^2      keeps the logits small, where fp32 is exact

Padding never counts. train/engine/load_balancer.py decides over which tokens f and P are taken.

Papers: Switch Transformer, arXiv 2101.03961 (f, P); ST-MoE, arXiv 2202.08906 (z-loss); straight-through
estimate, arXiv 1308.3432; MaxVio, arXiv 2408.15664.
"""

import torch

# Smallest share in a logarithm: ln 0 would give an infinite gradient. An expert without a token gets the
# slope ln(E * FLOOR), -11 with 16 experts; the busiest can have ln(16) + 1 = 4.
FLOOR = 1e-6


def expert_sums(routing, mask):
    """Sum the assignments and probabilities that each expert gets from the real tokens of each row.

    routing: scores (N, E), indices (N, K), N = B*T row by row;  mask (B, T), True for real tokens
    -> counts (B, E), without gradient, and probabilities (B, E), with it.
    """
    B, T = mask.shape
    E, K = routing.scores.shape[1], routing.indices.shape[1]
    real = mask.bool()
    counts = routing.scores.new_zeros(B, E)
    ones = real.repeat_interleave(K, dim=1).to(counts.dtype)  # (B, T*K)
    counts.scatter_add_(1, routing.indices.reshape(B, T * K), ones)
    probs = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)  # sigmoids can all be zero
    probs = probs.masked_fill(~real.view(-1, 1), 0)
    return counts, probs.view(B, T, E).sum(1)


def shares(counts, probs, experts_per_token):
    """Turn sums (..., E) of `expert_sums` into f (..., E) and P (..., E); all zeros if there is no token."""
    assignments = counts.sum(-1, keepdim=True).clamp(min=1)
    return counts / assignments, probs * experts_per_token / assignments


def balance_value(f, P, form, measure):
    """Return the loss (...) of f and P (..., E), with gradient through P alone."""
    E = P.shape[-1]
    if measure == "soft":
        f = P
    if form == "switch":
        return E * (f * P).sum(-1)
    if measure == "hard":
        f = f + (P - P.detach())  # straight through: the value of f, the gradient of P
    return (f * (E * f.clamp(min=FLOOR)).log()).sum(-1)


def z_loss(logits, mask):
    """Return the sum over real tokens of logsumexp(logits)^2. logits (N, E), mask (B, T)."""
    return logits.logsumexp(-1).masked_fill(~mask.bool().view(-1), 0).square().sum()


def max_vio(counts) -> float:
    """Return max / mean - 1 of the counts (E,): the excess of the busiest expert.

    0 is even, E/K - 1 the worst that K experts per token allow. Without any count it is 0.
    """
    total = float(counts.sum())
    return float(counts.max()) * len(counts) / total - 1 if total else 0.0


def lesson():
    """Train a mixture of 8 small linear experts with and without a balance loss; print the loads."""
    from config.model import ModelConfig
    from modules.experts.router import TopkRouter

    E, K, C, N = 8, 2, 8, 64
    config = ModelConfig(hidden_size=C, n_routed_experts=E, num_experts_per_tok=K, scoring_func="softmax")
    mask = torch.ones(1, N, dtype=torch.bool)
    print("8 experts, 2 per token: MaxVio (0 even, 3 worst) in training, each a mean over 30 steps")
    for form, weight in (("switch", 0), ("switch", 0.5), ("kl", 0.5)):
        torch.manual_seed(0)
        router, experts = TopkRouter(config), torch.zeros(E, C, C, requires_grad=True)
        torch.nn.init.normal_(router.weight, std=0.1)
        target = torch.randn(2, C, C) / C**0.5  # two maps, one for each sign of x_0 - 2
        optimizer, vio = torch.optim.Adam([router.weight, experts], lr=0.02), torch.zeros(120)
        for step in range(120):
            x = torch.randn(N, C) + 2  # hidden states of a real model share a direction too
            routing = router(x)
            y = (routing.weights[..., None] * (experts[routing.indices] @ x[:, None, :, None])[..., 0]).sum(1)
            error = (y - (target[(x[:, 0] > 2).long()] @ x[..., None])[..., 0]).square().mean()
            counts, probs = expert_sums(routing, mask)
            balance = balance_value(*shares(counts, probs, K), form, "hard").sum()
            optimizer.zero_grad(), (error + weight * balance).backward(), optimizer.step()
            vio[step] = max_vio(counts[0])
        loads = "  ".join(f"{part:.2f}" for part in vio.view(4, 30).mean(1).tolist())
        counts = counts[0].int().tolist()
        print(f"  {form:6s} x {weight:3}   MaxVio {loads}   tokens per expert at the end {counts}")


if __name__ == "__main__":
    lesson()
