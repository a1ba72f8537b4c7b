"""Attention sinks: the first tokens of a text stay visible, however far a sliding window has moved.

    a query q sees key k  if  k > q - W,  or  k is among the first n tokens of the text  (and k <= q)

The weights of a softmax sum to 1. A head that finds nothing must put them somewhere, and trained heads use
the first tokens, which every query can see. A window that loses those tokens ruins such a model; four of them
kept restore it (StreamingLLM, Xiao et al., arXiv 2309.17453).

    key_index (B or 1, S), document_ids and padding_mask (B, T)  ->  (B or 1, S) bool, True = a sink

StreamingLLM numbers positions by place in the cache: no distance ever exceeds the cache, so a model can read
on without end, untrained. Here tokens keep their true positions. A cached key is rotated once, and a row read
whole equals one read through a cache; with numbers that move, one key would need another rotation for each
query. The price: sinks become distant, so beyond the trained length they need a rule of rope_scaling.py.

Trap: the first tokens of a row are the wrong ones for its second document, and for a row padded on the left.
"""

import torch
import torch.nn.functional as F


def sink_keys(key_index, sinks: int, prefix: int = 0, document_ids=None, padding_mask=None):
    """Return which keys are among the first `sinks` real tokens of their text, or in the prefix before it.

    A text is a row, or each run of equal `document_ids` in it. These and the padding lack the prefix.
    """
    before = key_index[:, prefix:] - prefix  # real tokens of the row in front of each, (B or 1, T)
    if padding_mask is not None:
        before = padding_mask.long().cumsum(dim=1) - padding_mask.long()
    if document_ids is not None:
        begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
        before = before - torch.where(begins, before, 0).cummax(dim=1).values
    return F.pad(before < sinks, (prefix, 0), value=True)


def lesson():
    """Print which keys are seen with a window of 3 and one sink, in a row of two documents."""
    from modules.attention.context import build_context

    documents = torch.tensor([[0] * 6 + [1] * 6])
    print("Attention sinks: rows are queries, columns keys, # may attend; two documents of six tokens")
    masks = [build_context(12, "cpu", window=3, document_ids=documents, sinks=n).mask[0, 0] for n in (0, 1)]
    print("  a window of 3    and one sink")
    for rows in zip(*masks):
        print("  ", *("".join("#" if seen else "." for seen in row) + "  " for row in rows))
    scores = torch.tensor([5.0] + [0.0] * 11)  # of a head that finds nothing, so it looks at the first token
    for name, mask in zip(("without", "with"), masks):
        weights = scores.masked_fill(~mask[5], -torch.inf).softmax(dim=0)
        print(f"  weight of the sixth query on other tokens, {name} the sink: {weights[1:].sum():.2f}")


if __name__ == "__main__":
    lesson()
