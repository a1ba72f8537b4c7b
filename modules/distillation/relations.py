"""Distillation of attention: a student learns which tokens belong together, not what they are made of.

    maps        KL(softmax(q k^T / sqrt(D)) of the teacher, that of the student), head by head
                (MiniLM, arXiv 2002.10957): both need the same number of heads
    relations   the same for x x^T / sqrt(d), x = the queries, then the keys, then the values
                (MiniLMv2, arXiv 2012.15828): widths and numbers of heads are free

For a relation, the heads of a token are concatenated and split again into R relation heads, a number that
divides the widths of both models. So a teacher with 6 query heads and 3 key heads can teach a student with 2.

    q: (B, T, H, D) -> (B, T, H*D) -> (B, R, T, d), d = H*D / R      the same for k and v with G heads
    bias: (B or 1, 1, T, T), 0 where a query may attend, -inf elsewhere      -> (), summed over real tokens

Relations use the mask of the attention itself: causal, within a document, no padding. (MiniLMv2 distils BERT,
which relates all tokens.) The models have never compared a token with a later one or with another text in its
row, so those scores would be noise. A row of packed texts thus gives the same loss as each text alone.
Queries and keys are taken before the rotary embedding: it rotates pairs of channels by the position, so
neighbours would look alike, and the new heads would cut the pairs.

Teacher and student share the student's mask, so the loss never asks for a token that the student cannot see.
Traps: queries of padding attend to anything and must not count. At masked keys 0 log(0 / 0) is NaN, and so is
its gradient.
"""

import math

import torch

from modules.attention.context import build_context


def attention_kl(student, teacher, bias, real):
    """Return the mean over heads of KL(teacher, student), summed over real queries.

    student, teacher: scores (B, H, T, T); real (B, T) bool -> ().
    """
    student, teacher = ((scores + bias).log_softmax(dim=-1) for scores in (student, teacher))
    gap = (teacher - student).masked_fill(bias == -torch.inf, 0.0)
    per_token = (teacher.exp() * gap).sum(dim=-1).mean(dim=1)  # (B, T)
    return per_token[real].sum()


def relation_scores(x, heads):
    """Compare the tokens of a row with each other. x (B, T, H, D) -> (B, R, T, T)."""
    B, T = x.shape[:2]
    x = x.reshape(B, T, heads, -1).transpose(1, 2)  # (B, R, T, d)
    return x @ x.transpose(2, 3) / math.sqrt(x.shape[-1])


def relation_loss(student, teacher, heads, bias, real):
    """Return the sum of the relations of queries, keys and values, each as `attention_kl`.

    student, teacher: (q, k, v), each (B, T, H or G, D) of its own model -> ().
    """
    pairs = zip(student, teacher, strict=True)
    return sum(attention_kl(*(relation_scores(x, heads) for x in pair), bias, real) for pair in pairs)


def lesson():
    """Print a relation, and that a rotation of the basis does not change it."""
    torch.manual_seed(0)
    T, bias, real = 5, build_context(5, "cpu").bias(torch.float32), torch.ones(1, 5, dtype=torch.bool)
    teacher = torch.randn(1, T, 6, 8)  # six heads of 8
    print("relation of a teacher's 6 heads of 8, as 2 relation heads (the first; each row is a token)")
    for row in (relation_scores(teacher, 2) + bias).softmax(-1)[0, 0]:
        print("  ", *(f"{weight:5.2f}" for weight in row.tolist()))
    turn, _ = torch.linalg.qr(torch.randn(24, 24))  # within each relation head
    for name, x in {
        "6 heads of 8, at random": torch.randn(1, T, 6, 8),
        "the teacher's, in a rotated basis": teacher.view(1, T, 2, 24) @ turn,
        "a half of the teacher's channels": 2**0.5 * teacher.view(1, T, 2, 24)[..., :12],
    }.items():
        loss = attention_kl(relation_scores(x, 2), relation_scores(teacher, 2), bias, real) / T
        print(f"  student: {name:33s} {loss.abs():.3f} nats per token")


if __name__ == "__main__":
    lesson()
