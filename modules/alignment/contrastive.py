"""InfoNCE: each query picks its own document from those of the whole batch.

    s_ij = cos(q_i, d_j) / temperature
    to documents    L_i = -log( exp s_ip / sum over j of exp s_ij )       p: the document of query i
    to queries      the same over the column of document p: which of the queries is its own
    loss            the mean of both directions, for each query

Every other document is a negative, so a batch of N pairs gives each query N - 1 of them at no extra
cost, and more are better. A low temperature makes the loss look at the hardest negatives only: the gradient
of s_ij is the share of document j in the sum. Two traps:

- A document equal to the right one, or the document of an equal query, is not a negative: it is left out of
  the sums (`excluded`). Otherwise the loss pushes apart what belongs together.
- Scores of bf16 have steps of an eighth at 20 = 1 / 0.05, so they are computed in fp32.

Matryoshka: the loss of the first w channels, of unit length again, averaged over several w. A user may then
cut the vectors to any of these widths.

    queries: (N, C), documents: (M, C), M >= N with hard negatives, positives: (N,) places in documents,
    excluded: (N, M)  ->  losses (N,)

Papers: arXiv 1807.03748 (InfoNCE), 2103.00020 (both directions), 2205.13147 (Matryoshka).
"""

import torch

from modules.pooling import unit


def info_nce(queries, documents, positives, temperature: float, excluded=None, widths=()):
    """Return the loss of each query (N,), the mean over the full width and `widths`."""
    losses = []
    for width in (*(w for w in widths if w < queries.shape[1]), queries.shape[1]):
        scores = cosine_scores(unit(queries[:, :width]), unit(documents[:, :width])) / temperature  # (N, M)
        losses.append(both_directions(scores, positives, excluded))
    return sum(losses) / len(losses)


def cosine_scores(queries, documents):
    """Return the products of unit vectors, in fp32 or wider under autocast too: (N, C), (M, C) -> (N, M)."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(wide) @ documents.to(wide).T


def both_directions(scores, positives, excluded=None):
    """Return the mean of the losses over rows and over columns: scores (N, M), positives (N,) -> (N,)."""
    rows = torch.arange(len(scores), device=scores.device)
    right = scores[rows, positives]  # (N,)
    if excluded is not None:
        keep = torch.zeros_like(excluded)
        keep[rows, positives] = True  # the right document is never left out
        scores = scores.masked_fill(excluded & ~keep, -torch.inf)
    to_documents = scores.logsumexp(1) - right
    to_queries = scores[:, positives].logsumexp(0) - right
    return (to_documents + to_queries) / 2


def same_texts(query_keys, document_keys, owner_keys, positives):
    """Return which documents are not negatives of which queries (N, M): those with the text of the right one,
    and those of an equal query.

    query_keys (N,), document_keys (M,): numbers that identify texts. owner_keys (M,): the key of the query
    that a document answers, and something else for hard negatives, which answer none.
    """
    same_document = document_keys[positives][:, None] == document_keys[None]
    return same_document | (query_keys[:, None] == owner_keys[None])


def lesson():
    """Show what more negatives, a lower temperature and a copy among the negatives do."""
    generator = torch.Generator().manual_seed(0)
    documents = unit(torch.randn(1024, 64, generator=generator))
    queries = unit(documents + 0.15 * torch.randn(1024, 64, generator=generator))  # cosines near 0.64
    print("pairs in the batch   loss   (chance: log N)")
    for count in (4, 64, 1024):
        loss = info_nce(queries[:count], documents[:count], torch.arange(count), 0.1).mean()
        print(f"  {count:10} {loss:14.3f} {torch.tensor(count).log():10.3f}")
    print("temperature   share of the hardest 1 % of negatives in the gradient")
    for temperature in (1.0, 0.2, 0.05):
        scores = queries @ documents.T / temperature
        shares = scores.fill_diagonal_(-torch.inf).softmax(1).sort(1, descending=True).values
        print(f"  {temperature:9} {shares[:, :10].sum(1).mean():10.1%}")
    documents[1] = documents[0]  # a copy, as of a function in two files
    place, keys = torch.arange(2), torch.tensor([7, 7])
    for name, excluded in (("pushed away", None), ("left out", same_texts(place, keys, place, place))):
        loss = info_nce(queries[[0, 0]], documents[:2], place, 0.1, excluded)
        print(f"two pairs with one document, the copy {name}: loss {loss.mean():.3f}")


if __name__ == "__main__":
    lesson()
