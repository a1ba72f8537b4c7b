"""Pooling: one vector of unit length for a whole text, from the hidden states of its tokens.

    mean        the average over real tokens
    last        the last real token, which in a causal model has seen all others
    cls         the first real token, which an encoder fills with the whole text
    attention   a weighted average: the weight of token t is softmax over t of (h_t . query), with a learned
                query. After the final norm all h_t have about the same length, so a mean cannot tell
                `parse` from `the`; the query can

    y = p / |p|     so that the product of two vectors is the cosine of the angle between them

A row of padding only has no direction: it gives zeros, and passes no gradient back. Padding may be on
either side of a text, and its content never counts.

    hidden: (B, T, C), padding_mask: (B, T) True for real tokens, query: (C,)  ->  (B, C)

Papers: Sentence-BERT, arXiv 1908.10084 (mean against cls); arXiv 2401.00368 (last token of a decoder);
arXiv 1703.03130 (attention).
"""

import torch


def pool(hidden, padding_mask, kind: str, query=None):
    """Return the vector of each row, in fp32 or wider: (B, T, C), (B, T) -> (B, C).

    `query` (C,) is for the kind `attention` alone.
    """
    real = padding_mask.bool()
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    hidden = hidden.masked_fill(~real[..., None], 0)  # not a product: padding may hold NaN
    if kind == "mean":
        return unit(hidden.sum(1) / real.sum(1, keepdim=True).clamp(min=1))
    if kind == "attention":
        scores = (hidden * query.to(hidden.dtype)).sum(-1)  # (B, T); autocast would run `@` in bf16
        # The least finite number: with -inf, softmax makes NaN of a row of padding only.
        scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
        return unit((hidden * scores.softmax(1)[..., None]).sum(1))
    first = real.int().argmax(1)  # (B,), of equal values the first; 0 if there is none
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    place = {"cls": first, "last": last}[kind]
    return unit(hidden[torch.arange(len(hidden), device=hidden.device), place])


def unit(vectors):
    """Return vectors (..., C) of length one, zeros as zeros.

    Trap: `F.normalize` divides zeros by 1e-12, which multiplies their gradient by 1e12.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1)


def lesson():
    """Pool tokens of known meaning, and print what each kind keeps of them."""
    generator = torch.Generator().manual_seed(0)
    words = ("the", "parse", "reads", "json", "file")
    meaning = {word: torch.randn(64, generator=generator) for word in words}

    def text(sentence, padded=0):
        """Hidden states of words, with arbitrary values in place of padding, and the mask."""
        states = [meaning[word] for word in sentence.split()] + [torch.full((64,), 9.0)] * padded
        return torch.stack(states)[None], torch.tensor([[1] * (len(states) - padded) + [0] * padded])

    question = "parse the json file"
    query = -meaning["the"] / 10  # as if learned: the weight of this word is small
    print(f"cosines with {question!r}, each word a random vector of 64 channels")
    for other, padded in ((question, 3), ("json file the parse", 0), ("the file", 0), ("reads", 0)):
        shown = []
        for kind in ("mean", "last", "cls", "attention"):
            one, two = (pool(*text(*which), kind, query) for which in ((question,), (other, padded)))
            shown.append(f"{kind} {float((one * two).sum()):5.2f}")
        print(f"  {other:20} {padded} of padding   {'   '.join(shown)}")
    hidden = torch.zeros(1, 3, 64, requires_grad=True)
    empty = pool(hidden, torch.zeros(1, 3), "mean")
    empty.sum().backward()
    print(f"padding only: length {float(empty.detach().norm())}, gradient {float(hidden.grad.norm())}")
    print("The mean ignores the order of words; one token holds only what attention has collected in it.")


if __name__ == "__main__":
    lesson()
