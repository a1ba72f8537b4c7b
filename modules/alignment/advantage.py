"""Advantages: how much better an answer, or a token of it, was than expected.

Without a critic, an answer is compared with the other answers to its prompt (P prompts, G answers each):

    reward          A = r                                         REINFORCE without a baseline
    mean            A = r - mean                                  Dr. GRPO, arXiv 2503.20783
    mean_std        A = (r - mean) / (std + 1e-4)                 GRPO, arXiv 2402.03300
    leave_one_out   A = r - mean of the others = (r - mean) G / (G - 1)         RLOO, arXiv 2402.14740

With a critic V, each token is compared with what the critic expected (generalised advantage estimation, GAE,
arXiv 1506.02438):

    delta_t = r_t + gamma V_{t+1} - V_t       A_t = delta_t + gamma lam A_{t+1}       return_t = A_t + V_t

lam = 0 trusts the critic one token ahead; lam = 1 gives the sum of rewards minus V_t and trusts no critic.

    rewards (P, G) -> advantages (P, G)       rewards, values, mask (B, T) -> advantages, returns (B, T)

Traps: a reshape from (P * G) rows to groups needs the samples of a prompt side by side, or prompts are
compared with each other. `std` is the unbiased one, as in torch. The answer's last token is followed by
nothing: the value after it is 0, whether the answer ended by itself or at the limit of tokens. The verifier
scored the answer as it is, so the limit is part of the task. Adding the critic's hope for a continuation that
will never be written would reward rambling.
"""

import torch

EPSILON = 1e-4  # in GRPO's divisor: a group of equal rewards has deviation 0


def group_advantages(rewards, kind):
    """Compare each reward with those of its group. rewards (P, G) -> (P, G)."""
    if kind == "reward":
        return rewards
    G = rewards.shape[1]
    # Equal rewards must give exactly 0: their rounded mean may differ from them, and is divided by 1e-4.
    rewards = rewards - rewards[:, :1]
    above = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "leave_one_out":
        return above * G / (G - 1)
    return above / (rewards.std(dim=1, keepdim=True) + EPSILON) if kind == "mean_std" else above


@torch.no_grad()
def gae(rewards, values, mask, gamma, lam):
    """Estimate advantages and returns, both 0 outside the mask.

    rewards, values (B, T); mask (B, T), True at the tokens that the policy wrote. Tokens between them (the
    output of a tool) are skipped: the next token of the policy follows directly.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage.where(mask[:, t], 0)
        next_value = values[:, t].where(mask[:, t], next_value)
        next_advantage = advantage.where(mask[:, t], next_advantage)
    return advantages, (advantages + values).where(mask, 0)


def masked_sums(x, mask):
    """Return count, sum and sum of squares of x (B, T) over the mask, fp64 (3,): they add up over parts."""
    x = x.detach().double().where(mask, 0)
    return torch.stack([mask.sum().double(), x.sum(), x.square().sum()])


def whiten(x, mask, sums=None):
    """Shift and scale x (B, T) to mean 0 and variance 1 (unbiased) over the mask; 0 outside.

    `sums` are those of the whole (`masked_sums`), where x is one of several parts.
    """
    count, total, squares = masked_sums(x, mask) if sums is None else sums
    mean = total / count.clamp(min=1)
    # Rounding may leave a tiny negative variance where all are equal.
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    return ((x - mean) * (variance + 1e-8).rsqrt()).to(x.dtype).where(mask, 0)


def lesson():
    """Print what groups teach about easy and hard prompts, and whom lambda trusts."""
    print("advantage of a right and a wrong answer among 8, by how many of the 8 are right")
    for right in (1, 4, 7, 8):
        rewards = torch.tensor([[1.0] * right + [0.0] * (8 - right)])
        cells = []
        for kind in ("mean", "mean_std", "leave_one_out"):
            A = group_advantages(rewards, kind)[0]
            cells.append(f"{kind} {A[0]:+.2f} {A[-1]:+.2f}")
        print(f"  {right} of 8:  " + "   ".join(cells))
    print("the deviation makes rare successes and rare failures louder; equal rewards teach nothing\n")

    torch.manual_seed(0)
    N, T = 2000, 20  # after a good first token the reward at the end is 1 in 80 % of cases, else in 20 %
    good = torch.arange(N) < N // 2
    rewards = torch.zeros(N, T)
    rewards[:, -1] = (torch.rand(N) < torch.where(good, 0.8, 0.2)).float()
    knows = torch.where(good, 0.8, 0.2)[:, None].repeat(1, T)
    knows[:, 0] = 0.5
    critics = {"blind critic (0.5 everywhere)": torch.full((N, T), 0.5), "critic that knows": knows}
    print("GAE of the good first token; its true advantage is 0.30")
    for name, values in critics.items():
        for lam in (0.0, 0.5, 0.95, 1.0):
            A = gae(rewards, values, torch.ones(N, T, dtype=torch.bool), 1.0, lam)[0][good, 0]
            print(f"  {name:30s} lambda {lam:.2f}: mean {A.mean():.2f}, deviation {A.std():.2f}")


if __name__ == "__main__":
    lesson()
