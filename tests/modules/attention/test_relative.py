"""Relative positions against Hugging Face's, and attention with a bias against a loop."""

import pytest
import torch

from config.seq2seq import Seq2SeqConfig
from modules.attention.relative import RelativeAttention, RelativeBias, bucket
from modules.attention.source import Source, SourceCache, source_bias
from tests.modules.tools import shake


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("buckets, far", [(32, 128), (8, 9), (12, 40), (64, 500)])
def test_buckets_are_those_of_transformers(both_ways, buckets, far):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distances, both_ways, buckets, far)
    ours = bucket(distances, both_ways, buckets, far)
    assert torch.equal(ours, expected)
    used = set(range(buckets)) - ({buckets // 2} if both_ways else set())  # no key follows by 0 tokens
    assert far > 300 or set(ours.tolist()) == used


def make(**changes):
    values = {"hidden_size": 10, "num_attention_heads": 3, "head_dim": 4, "relative_attention_num_buckets": 8,
              "relative_attention_max_distance": 9}  # fmt: skip
    return Seq2SeqConfig(**(values | changes))


@pytest.mark.parametrize("both_ways", [True, False])
def test_the_bias_is_looked_up_for_each_pair(both_ways):
    """Rows of a batch may be at different places, as with a cache."""
    table = shake(RelativeBias(make(), both_ways), seed=2)
    query, key = torch.tensor([[4, 5], [0, 1]]), torch.arange(7)[None]
    bias = table(query, key)
    assert bias.shape == (2, 3, 2, 7)
    for b in range(2):
        for t in range(2):
            for s in range(7):
                number = bucket(key[0, s] - query[b, t], both_ways, 8, 9)
                assert torch.equal(bias[b, :, t, s], table.weight[number])


@pytest.mark.parametrize("heads, T, S", [(3, 5, 5), (1, 2, 7), (2, 1, 1)])
def test_attention_is_that_of_the_loop(heads, T, S):
    attention = shake(RelativeAttention(make(num_attention_heads=heads)), seed=3).double()
    draw = torch.Generator().manual_seed(4)
    x, y, bias = (torch.randn(shape, generator=draw, dtype=torch.float64)
                  for shape in ((2, T, 10), (2, S, 10), (2, heads, T, S)))  # fmt: skip
    bias[:, :, :, S // 2 :][:, :, : T // 2] = -torch.inf
    out = attention(x, *attention.keys_values(y), bias)
    q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    for b in range(2):
        for t in range(T):
            parts = []
            for h in range(heads):
                rows = slice(4 * h, 4 * h + 4)
                scores = torch.stack([q[rows] @ x[b, t] @ (k[rows] @ y[b, s]) for s in range(S)])
                weights = (scores + bias[b, h, t]).exp()
                weights = weights / weights.sum()
                parts.append(sum(weights[s] * (v[rows] @ y[b, s]) for s in range(S)))
            torch.testing.assert_close(out[b, t], o @ torch.cat(parts), rtol=1e-10, atol=1e-10)


def test_an_empty_source_is_read_as_zero():
    attention = shake(RelativeAttention(make()), seed=5)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    x, y = torch.randn(2, 4, 10, requires_grad=True), torch.randn(2, 3, 10)
    y = (y * mask[:, :, None]).requires_grad_()
    out = attention(x, *attention.keys_values(y), source_bias(mask, torch.float32))
    assert not out[1].any() and out[0].all()
    out.square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[1].any() and x.grad[0].any()
    assert not y.grad[0, 1].any() and y.grad[0, 0].any()


def test_the_source_goes_with_its_rows():
    keys_values = [(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    source = Source(keys_values, source_bias(mask, torch.float32))
    cache = SourceCache(source, capacity=6)
    cache.begin(2, [2, 1, 2])
    for layer in range(2):
        cache.append(layer, *torch.randn(2, 3, 2, 2, 4))
    cache.advance()
    numbers = 2 * 2 * 3 * 2 * (6 + 5) * 4  # layers, keys and values, rows, heads, tokens, channels
    assert cache.bytes == 4 * numbers
    rows = [2, 0, 0]
    cache.select(rows)
    cache.crop([1, 2, 1])
    assert cache.lengths == [1, 2, 1]
    for before, after in zip(keys_values, cache.source.keys_values, strict=True):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[rows], other)
    assert torch.equal(cache.source.bias[:, 0, 0].isinf(), ~mask.bool()[rows] & mask.any(dim=1)[rows, None])
    assert source.keys_values is keys_values and len(source.bias) == 3  # that of the reader is unchanged
