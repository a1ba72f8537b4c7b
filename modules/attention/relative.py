"""T5's attention: a trained number per head and distance is added to the scores, which are not scaled.

    attention(q, k, v) = softmax(q k^T + bias) v        bias[h, i, j] = table[bucket(j - i), h]

Positions enter here and nowhere else: nothing is embedded or rotated. The distance j - i of key and query
falls into one of 32 buckets. Near distances have a bucket each; longer ones share buckets that widen with
the distance, and all from 128 tokens on share the last, so a row may be longer than any in training:

    bucket(d) = d                                                         d < E, with E exact buckets
                E + floor(E * log(d / E) / log(128 / E)), at most 2E - 1  otherwise

A decoder looks back only: 2E = 32. An encoder looks both ways: 2E = 16, and 16 more for keys that follow.
In the paper's code the table belongs to the first layer; all layers share it, so it is computed once.

    query_index (B or 1, T), key_index (B or 1, S)  ->  bias (B or 1, H, T, S)
    q: (B, H, T, D)   k, v: (B, H, S, D)            ->  (B, H, T, D)

The factor 1/sqrt(D) of other attention is in the initial weights of the queries instead.

Paper: Raffel et al., "Exploring the Limits of Transfer Learning", arXiv 1910.10683. Names as in the decoder.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from modules.attention.grouped_query import scores_of, weighted_sum


def bucket(distance, both_ways: bool, buckets: int, far: int):
    """distance (...) of int, key minus query -> the number of its bucket (...), below `buckets`.

    Trap: log(16 / 8) / log(128 / 8) * 8 is 2, a limit between buckets, or a little less after rounding.
    Published weights were trained with the value in fp32: keep the order of operations.
    """
    buckets = buckets // 2 if both_ways else buckets
    side = (distance > 0) * buckets if both_ways else 0  # the second half is for keys that follow
    distance = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(far / exact)
    shared = exact + (ratio * (buckets - exact)).long()
    return side + torch.where(distance < exact, distance, shared.clamp(max=buckets - 1))


class RelativeBias(nn.Module):
    """The table: `forward(query_index, key_index)` -> what to add to the scores of each head."""

    def __init__(self, config, both_ways: bool):
        super().__init__()
        self.both_ways, self.far = both_ways, config.relative_attention_max_distance
        size = (config.relative_attention_num_buckets, config.num_attention_heads)
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, query_index, key_index):
        """query_index (B or 1, T), key_index (B or 1, S) -> (B or 1, H, T, S)."""
        distance = key_index[:, None, :] - query_index[:, :, None]  # (B or 1, T, S)
        numbers = bucket(distance, self.both_ways, len(self.weight), self.far)
        return F.embedding(numbers, self.weight).permute(0, 3, 1, 2)  # (.., T, S, H) -> (.., H, T, S)


class RelativeAttention(nn.Module):
    """Attention of one layer, to its own tokens or to a source, without biases in the projections.

    Args:
        config: reads hidden_size, num_attention_heads, head_dim, dropout.
    """

    def __init__(self, config):
        super().__init__()
        width = config.num_attention_heads * config.head_dim  # H*D
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def heads(self, x):
        """(B, T, H*D) -> (B, H, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, x):
        """(B, S, C) -> keys and values, each (B, H, S, D)."""
        return self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def forward(self, x, keys, values, bias=None):
        """x (B, T, C), keys and values (B, H, S, D), bias that broadcasts to (B, H, T, S) -> (B, T, C)."""
        scores = scores_of(self.heads(self.q_proj(x)), keys, scale=1.0)  # (B, H, T, S)
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        out = weighted_sum(F.dropout(weights, self.dropout, self.training), values)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H*D) -> (B, T, C)


def lesson():
    """Print where the buckets begin, and what a head sees that prefers the token just before."""
    from config.seq2seq import Seq2SeqConfig

    distances = torch.arange(0, 200)
    numbers = bucket(-distances, False, 32, 128).tolist()
    starts = [numbers.index(number) for number in range(32)]
    print("T5 buckets of a decoder: the smallest distance of each")
    print(" ", *starts)
    print(f"  distances of 113 and 199 share bucket {numbers[113]}, which has no upper limit")
    both = bucket(torch.arange(-3, 4), True, 32, 128).tolist()
    print("  an encoder tells the sides apart; distances -3 .. 3 have buckets", both)
    bias = RelativeBias(Seq2SeqConfig(num_attention_heads=1), both_ways=True)  # starts with zeros
    with torch.no_grad():
        bias.weight[1] = 3.0  # the token before
    index = torch.arange(6)[None]
    print("attention weights of a head whose table has 3 in bucket 1 and 0 elsewhere, for equal keys:")
    for row in bias(index, index)[0, 0].softmax(dim=-1):
        print("  ", *[f"{weight:5.2f}" for weight in row.tolist()])


if __name__ == "__main__":
    lesson()
