"""Attention maps and relations against an obvious loop: heads, widths, documents and padding."""

import math

import torch

from modules.attention.context import build_context
from modules.distillation.relations import attention_kl, relation_loss, relation_scores

B, T = 2, 7
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
REAL = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])


def bias():
    """Of causal rows: two texts in the first, two columns of padding in the second."""
    return build_context(T, "cpu", document_ids=DOCUMENTS, padding_mask=REAL).bias(torch.float64)


def allowed(b, query, key):
    """The same rule, for the loop."""
    return key <= query and DOCUMENTS[b, key] == DOCUMENTS[b, query] and bool(REAL[b, key])


def heads(*shapes, seed=0):
    """Random numbers (B, T, H, D) for each (H, D)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def slow_kl(student, teacher):
    """KL(teacher, student) of scores (B, R, T, T): a sum over real queries, the mean over heads."""
    R, total = student.shape[1], 0.0
    for b in range(B):
        for t in range(T):
            if not REAL[b, t]:
                continue
            keys = [s for s in range(T) if allowed(b, t, s)]
            for r in range(R):
                q, p = (torch.stack([x[b, r, t, s] for s in keys]).softmax(0) for x in (student, teacher))
                total = total + sum(p[n] * (p[n] / q[n]).log() for n in range(len(keys))) / R
    return total


def slow_relation(x, R):
    """Scores of R heads, cut out of the channels of a token one by one."""
    flat = [[[x[b, t, h, d] for h in range(x.shape[2]) for d in range(x.shape[3])] for t in range(T)]
            for b in range(B)]  # fmt: skip
    size = len(flat[0][0]) // R
    cut = [[[flat[b][t][r * size : (r + 1) * size] for t in range(T)] for r in range(R)] for b in range(B)]
    rows = [[[[sum(i * j for i, j in zip(a, c, strict=True)) / math.sqrt(size) for c in head] for a in head]
             for head in row] for row in cut]  # fmt: skip
    return torch.stack([torch.stack([torch.stack([torch.stack(line) for line in head]) for head in row])
                        for row in rows])  # fmt: skip


def test_relations_of_other_widths_and_heads():
    """A teacher with 6 heads on 3 of 4 channels, a student with 3 heads on 3 of 2: value, and the gradient in
    queries, keys and values of the student."""
    student = [one.requires_grad_() for one in heads((3, 2), (3, 2), (3, 2))]
    teacher = heads((6, 4), (3, 4), (3, 4), seed=1)
    loss = relation_loss(student, teacher, 3, bias(), REAL)
    pairs = zip(student, teacher, strict=True)
    expected = sum(slow_kl(slow_relation(a, 3), slow_relation(b, 3)) for a, b in pairs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(*(torch.autograd.grad(one, student) for one in (loss, expected)), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


def test_a_packed_row_is_each_text_alone():
    student, teacher = heads((4, 2), (2, 4))
    together = attention_kl(*(relation_scores(x, 2) for x in (student, teacher)), bias(), REAL)
    parts = [(0, slice(0, 3)), (0, slice(3, 7)), (1, slice(0, 5))]
    alone = 0.0
    for row, span in parts:
        length = span.stop - span.start
        scores = [relation_scores(x[row : row + 1, span], 2) for x in (student, teacher)]
        plain = build_context(length, "cpu").bias(torch.float64)
        alone += attention_kl(*scores, plain, torch.ones(1, length, dtype=torch.bool))
    torch.testing.assert_close(together, alone)


def test_padding_in_the_mean_would_be_seen():
    """A saboteur that counts the queries of padding, which attend to anything."""
    student, teacher = (relation_scores(x, 2) for x in heads((4, 2), (2, 4)))
    right = attention_kl(student, teacher, bias(), REAL)
    assert attention_kl(student, teacher, bias(), torch.ones_like(REAL)) > 1.05 * right
