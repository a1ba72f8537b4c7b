"""Hidden states against sentence-transformers, `F.mse_loss` and the published maps."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modules.distillation.hidden import KINDS, HiddenProjection, hidden_loss, layer_pairs
from tests.modules.alignment.oracles import lifted


def states():
    """Two layers of a student of 6 channels, and of a teacher of 10; the last two tokens are padding."""
    torch.manual_seed(0)
    ours = [torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    theirs = [torch.randn(2, 5, 10, dtype=torch.float64) for _ in range(2)]
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    return ours, theirs, real, HiddenProjection([(0, 1), (1, 3)], 6, 10).double()


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers(kind):
    """Its loss of projected embeddings, one column for each layer and only the real tokens; value and the
    gradients of states and projections. Ours is a sum over tokens."""
    theirs = lifted("sentence_transformers", "sentence_transformer/losses/embed_distill.py",
                    "compute_loss_from_embeddings").compute_loss_from_embeddings  # fmt: skip
    ours, teacher, real, projection = states()
    columns = [layer(one[real]) for layer, one in zip(projection.layers, ours, strict=True)]
    about = SimpleNamespace(projection=None, distance_metric=kind)
    expected = real.sum() * theirs(about, columns, [one[real] for one in teacher])
    loss = hidden_loss(projection(ours), teacher, real, kind)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    inputs = [*ours, *projection.parameters()]
    wanted = torch.autograd.grad(expected, inputs)
    for found, other in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-14)
    assert not wanted[0][~real].any()  # padding teaches nothing


def test_one_layer_is_mse_loss():
    ours, teacher, real, projection = states()
    projected = projection(ours)
    expected = F.mse_loss(projected[1][real], teacher[1][real]) * real.sum()
    torch.testing.assert_close(hidden_loss(projected[1:], teacher[1:], real, "mse"), expected)


def test_the_published_maps():
    """TinyBERT-4 of BERT-base takes every third layer, TinyBERT-6 every second (arXiv 1909.10351: layer m of
    the student meets layer 3 m, or 2 m, counted from 1)."""
    assert layer_pairs(4, 12, "uniform") == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert [theirs + 1 for _, theirs in layer_pairs(6, 12, "uniform")] == [2 * m for m in range(1, 7)]
    assert layer_pairs(3, 7, "uniform")[-1] == layer_pairs(3, 7, "last")[0] == (2, 6)
