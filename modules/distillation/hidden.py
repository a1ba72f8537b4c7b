"""Distillation of hidden states: each layer of a student learns the output of a layer of the teacher.

    mse       |P_i s_i - t_m(i)|^2 / C'        (TinyBERT, arXiv 1909.10351)
    cosine    1 - cos(P_i s_i, t_m(i))         (DistilBERT, arXiv 1910.01108): direction without length

    s_i: (B, T, C), after layer i of the student      t: (B, T, C'), after a layer of the teacher
    P_i: (C', C), learned, no bias                    loss: (), summed over real tokens, the mean of layers

The projection exists only during training: the student's checkpoint does not contain it. Since it may be any
matrix, the student need not use the teacher's basis.

The map m pairs the S layers of the student with S' of the teacher. `uniform`: (i + 1) S' // S - 1, the last
of each block of S' / S layers (4 of 12: 2, 5, 8, 11). `last`: the last layers alone.
"""

import torch
import torch.nn.functional as F
from torch import nn

KINDS = ("mse", "cosine")


def layer_pairs(student_layers, teacher_layers, kind):
    """Return the pairs of layers that are compared, (student's, teacher's), counted from 0."""
    if kind == "last":
        return [(student_layers - 1, teacher_layers - 1)]
    return [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)]


class HiddenProjection(nn.Module):
    """One matrix for each pair of layers: `forward` maps a list of (B, T, C) to a list of (B, T, C')."""

    def __init__(self, pairs, student_size, teacher_size):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(student_size, teacher_size, bias=False) for _ in pairs)

    def forward(self, hidden):
        """Project the states of each layer by its own matrix."""
        return [layer(one) for layer, one in zip(self.layers, hidden, strict=True)]


def hidden_loss(projected, teacher, real, kind):
    """Return the mean over layers of the loss, summed over real tokens.

    projected, teacher: lists of (B, T, C'); real (B, T) bool, False for padding -> ().
    """
    losses = []
    for ours, theirs in zip(projected, teacher, strict=True):
        ours, theirs = ours[real], theirs[real]  # (N, C')
        if kind == "mse":
            losses.append((ours - theirs).square().mean(dim=-1).sum())
        else:
            losses.append((1 - F.cosine_similarity(ours, theirs, dim=-1)).sum())
    return torch.stack(losses).mean()


def lesson():
    """Print how well the best narrow states can be projected to wide ones."""
    torch.manual_seed(0)
    teacher = torch.randn(512, 12) @ torch.randn(12, 48) / 12**0.5  # (N, C'): 48 channels of rank 12
    teacher = (teacher + 0.1 * torch.randn(512, 48))[None]
    real = torch.ones(1, 512, dtype=torch.bool)
    u, s, vh = torch.linalg.svd(teacher[0], full_matrices=False)
    print("48 channels of a teacher, 12 of them free; the best states of C channels and their projection:")
    for size in (4, 8, 12, 24):
        projection = HiddenProjection([(0, 0)], size, 48)
        projection.layers[0].weight.data = vh[:size].T
        state = (u[:, :size] * s[:size])[None]  # the best of that rank (Eckart and Young)
        losses = [hidden_loss(projection([state]), [teacher], real, kind).item() / 512 for kind in KINDS]
        print(f"  C = {size:2d}  mse {losses[0]:.4f}  cosine {losses[1]:.4f}")


if __name__ == "__main__":
    lesson()
