"""InfoNCE against PyTorch's cross-entropy and an obvious loop, values and gradients; and mistakes that the
tests must notice."""

import math

import pytest
import torch
import torch.nn.functional as F

from modules.alignment import contrastive
from modules.alignment.contrastive import info_nce, same_texts

PAIRS, WRONG, C = 6, 3, 8


def material(dtype=torch.float64):
    """Vectors that want a gradient, not of unit length; the documents in another order than the queries."""
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(PAIRS, C, generator=generator, dtype=dtype)
    documents = torch.randn(PAIRS + WRONG, C, generator=generator, dtype=dtype)
    places = torch.randperm(PAIRS + WRONG, generator=generator)[:PAIRS]
    documents[places] += queries
    return queries.requires_grad_(), documents.requires_grad_(), places


def obvious(queries, documents, places, temperature, excluded=None, widths=()):
    """One query, one width and one direction at a time."""
    losses = []
    for i, query in enumerate(queries):
        total = 0
        for width in (*widths, C):

            def cosine(a, b, width=width):
                return F.cosine_similarity(a[:width], b[:width], dim=0) / temperature

            right, own = places[i], cosine(query, documents[places[i]])
            allowed = lambda i, j: excluded is None or not excluded[i, j]  # noqa: E731
            others = [cosine(query, document) for j, document in enumerate(documents)
                      if j != right and allowed(i, j)]  # fmt: skip
            askers = [cosine(other, documents[right]) for k, other in enumerate(queries)
                      if k != i and allowed(k, right)]  # fmt: skip
            for negatives in (others, askers):
                total = total + sum(score.exp() for score in [own, *negatives]).log() - own
        losses.append(total / 2 / (1 + len(widths)))
    return torch.stack(losses)


def check_cross_entropy():
    """Both directions are cross-entropies of the matrix of cosines."""
    queries, documents, places = material(torch.float32)
    for temperature in (0.05, 1.0):
        scores = F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T / temperature
        to_documents = F.cross_entropy(scores, places, reduction="none")
        to_queries = F.cross_entropy(scores[:, places].T, torch.arange(PAIRS), reduction="none")
        expected = (to_documents + to_queries) / 2
        found = info_nce(queries, documents, places, temperature)
        torch.testing.assert_close(found, expected)
        inputs = (queries, documents)
        found, expected = (torch.autograd.grad(loss.sum(), inputs) for loss in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # gradients up to 20, in fp32


def check_exclusion():
    """What is excluded takes no part in value or gradient, the right document always does."""
    queries, documents, places = material()
    excluded = torch.rand(PAIRS, PAIRS + WRONG, generator=torch.Generator().manual_seed(3)) < 0.4
    assert excluded[torch.arange(PAIRS), places].any()
    found, expected = (loss(queries, documents, places, 0.2, excluded) for loss in (info_nce, obvious))
    torch.testing.assert_close(found, expected)
    for one in (found, expected):
        assert one.isfinite().all()
    found, expected = (torch.autograd.grad(loss.sum(), (queries, documents)) for loss in (found, expected))
    torch.testing.assert_close(found, expected)


def test_the_loss_is_two_cross_entropies():
    check_cross_entropy()


def test_what_is_excluded_takes_no_part():
    check_exclusion()


def test_matryoshka_averages_the_losses_of_cut_vectors():
    queries, documents, places = material()
    found, expected = (loss(queries, documents, places, 0.1, None, (2, 5)) for loss in (info_nce, obvious))
    torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad(loss.sum(), (queries, documents)) for loss in (found, expected))
    torch.testing.assert_close(found, expected)
    alone = info_nce(queries, documents, places, 0.1, widths=(C, 2 * C))  # no smaller width: nothing to add
    torch.testing.assert_close(alone, info_nce(queries, documents, places, 0.1))


def test_scores_are_computed_in_fp32_under_autocast():
    queries, documents, places = (part.detach() for part in material(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(queries, documents, places, 0.05)
    torch.testing.assert_close(loss, info_nce(queries, documents, places, 0.05))


def test_a_single_pair_and_a_vector_of_zeros_give_numbers():
    one = torch.ones(1, C, requires_grad=True)
    loss = info_nce(one, one, torch.tensor([0]), 0.05)
    assert loss.item() == 0
    nothing = torch.zeros(2, C, requires_grad=True)
    loss = info_nce(nothing, nothing, torch.arange(2), 0.05).sum()
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2)) and nothing.grad.isfinite().all()


def test_equal_texts_are_no_negatives():
    """Queries 0 and 3 are one text, documents 1 and 2 too; the last document is wrong, and equal to that of
    query 0."""
    query_keys, document_keys = torch.tensor([5, 6, 7, 5]), torch.tensor([1, 2, 2, 3, 1])
    found = same_texts(query_keys, document_keys, torch.tensor([5, 6, 7, 5, -1]), torch.arange(4))
    expected = [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]
    assert found.int().tolist() == expected


def without_temperature(scores, places, excluded=None, rule=contrastive.both_directions):
    return rule(scores * 0.05, places, excluded)


def excluding_the_right_one(scores, places, excluded=None):
    scores = scores if excluded is None else scores.masked_fill(excluded, -torch.inf)
    right = scores[torch.arange(len(scores)), places]
    return (scores.logsumexp(1) + scores[:, places].logsumexp(0)) / 2 - right


def right_one_twice(scores, places, excluded=None):
    right = scores[torch.arange(len(scores)), places]
    both = torch.cat([scores, right[:, None]], 1).logsumexp(1) + scores[:, places].logsumexp(0)
    return both / 2 - right


def copies_pushed_away(scores, places, excluded=None, rule=contrastive.both_directions):
    return rule(scores, places)


@pytest.mark.parametrize(
    ("mistake", "check"),
    [(without_temperature, check_cross_entropy), (right_one_twice, check_cross_entropy),
     (excluding_the_right_one, check_exclusion), (copies_pushed_away, check_exclusion)],
)  # fmt: skip
def test_a_saboteur_is_noticed(mistake, check, monkeypatch):
    monkeypatch.setattr(contrastive, "both_directions", mistake)
    with pytest.raises(AssertionError):
        check()
