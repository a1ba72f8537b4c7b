"""Losses on pairs of answers to one prompt, of which one is preferred.

Bradley and Terry (1952): an answer with reward r_c is preferred to one with reward r_r with probability
sigmoid(r_c - r_r). A reward model maximises the likelihood of the preferences that were observed:

    bradley_terry   -logsigmoid(r_c - r_r)                                            arXiv 2203.02155

A policy can be trained on the pairs without a reward model, with its log-probabilities l = log pi(answer) in
the place of rewards, and those of a frozen reference policy, l', to hold on to:

    dpo     -logsigmoid(beta ((l_c - l'_c) - (l_r - l'_r)))        sums over tokens   arXiv 2305.18290
    ipo     ((l_c - l'_c) - (l_r - l'_r) - 1 / (2 beta))^2         means over tokens  arXiv 2310.12036
    simpo   -logsigmoid(beta (l_c - l_r) - margin)                 means, no reference   arXiv 2405.14734
    orpo    -l_c - beta logsigmoid(log odds(l_c) - log odds(l_r))  means, no reference   arXiv 2403.07691
            log odds(l) = l - log(1 - e^l)

    logprobs, reference, mask: (B, T) -> `answer_scores`: (B,), the l or l - l' of each row
    chosen, rejected: (P,) -> `pair_loss`: (P,)

DPO's implicit reward is beta (l - l'): at the start it is 0 for every answer and the loss is ln 2. DPO pushes
the margin up without bound; IPO's square stops at a margin of 1 / (2 beta), and takes means, as its authors
do in practice. The mean in SimPO and ORPO takes away the advantage of short answers.

Traps: a mask that drops the end token, or keeps a token of the prompt. A mean over tokens where the formula
has a sum. Dropout: the policy then differs from the reference before the first step.
"""

import torch
import torch.nn.functional as F

KINDS = ("dpo", "ipo", "simpo", "orpo")
WITH_REFERENCE = ("dpo", "ipo")
SUREST = -1e-6  # log odds are infinite for a probability of 1, and their gradient is NaN


def answer_scores(kind, logprobs, mask, reference=None):
    """Return the score of each row (B,): the sum (dpo) or mean over the tokens of its answer.

    logprobs (B, T) of the policy, reference (B, T) for the kinds `WITH_REFERENCE`, mask (B, T) bool: the
    tokens of the answer with its end token. An empty answer has score 0.
    """
    scores = logprobs - reference if kind in WITH_REFERENCE else logprobs
    total = scores.masked_fill(~mask, 0).sum(1)
    return total if kind == "dpo" else total / mask.sum(1).clamp(min=1)


def pair_loss(kind, chosen, rejected, beta, margin=0.0):
    """Return the loss (P,) of the scores (P,) of the chosen and the rejected answers; `margin`: SimPO's."""
    difference = chosen - rejected
    if kind == "dpo":
        return -F.logsigmoid(beta * difference)
    if kind == "ipo":
        return (difference - 1 / (2 * beta)).square()
    if kind == "simpo":
        return -F.logsigmoid(beta * difference - margin)
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprob):
    """Return log(p / (1 - p)) for a log-probability, element by element."""
    logprob = logprob.clamp(max=SUREST)
    return logprob - (-torch.expm1(logprob)).log()


def bradley_terry(chosen, rejected):
    """Return the loss (P,) of a reward model that gave these rewards (P,)."""
    return -F.logsigmoid(chosen - rejected)


def lesson():
    """Train a policy over five answers on one pair with each loss, and show which probabilities rise."""
    # Answers as features: chosen and rejected are alike, as two attempts at one question are.
    features = torch.tensor([[1.0, 1, 0.3], [1.0, 1, -0.3], [0, 0, 2], [1.0, -1, 0], [-1.0, 0, 0]])
    mask = torch.ones(5, 1, dtype=torch.bool)
    start = (features @ torch.tensor([0.6, 0.4, 0.0])).log_softmax(0)[:, None]  # (answers, one token)
    print("one pair, five answers: the chosen, the rejected one like it, and three others")
    print(f"  {'':6} loss at first  p(chosen)  p(rejected)  p(others)  margin l_c - l_r")
    chances = start.exp()[:, 0]
    print(f"  before {'':13} {chances[0]:9.3f} {chances[1]:12.3f} {chances[2:].sum():10.3f}")
    for kind, beta in (("dpo", 0.1), ("ipo", 0.1), ("simpo", 2.0), ("orpo", 0.1)):
        weights = torch.tensor([0.6, 0.4, 0.0], requires_grad=True)
        optimizer, losses = torch.optim.SGD([weights], lr=0.2), []
        for _ in range(300):
            logprobs = (features @ weights).log_softmax(0)[:, None]
            scores = answer_scores(kind, logprobs, mask, start)
            losses.append(pair_loss(kind, scores[0], scores[1], beta, margin=1.0))
            optimizer.zero_grad(), losses[-1].backward(), optimizer.step()
        chances = logprobs.detach().exp()[:, 0]
        margin = (chances[0] / chances[1]).log()
        print(f"  {kind:6} {losses[0]:13.3f} {chances[0]:9.3f} {chances[1]:12.3f} {chances[2:].sum():10.3f}"
              f" {margin:9.2f}")  # fmt: skip
    print("dpo, ipo and simpo ask for a margin only: where answers are alike, both may lose to a third.")


if __name__ == "__main__":
    lesson()
