"""Masks against a double loop over queries and keys, for random mixtures of every rule."""

import random

import pytest
import torch

from modules.attention.context import build_context
from modules.attention.cache import KVCache
from modules.attention.rolling_cache import RollingKVCache


def seen_by(context, rows, tokens, keys):
    """The context as a (B, T, S) mask, whichever way it says it."""
    if context.mask is not None:
        assert not context.is_causal and context.mask.dtype == torch.bool
        some, others = slice(tokens // 3, tokens // 3 + 4), slice(keys // 2, keys // 2 + 3)
        assert torch.equal(context.rules.tile(some, others), context.mask[:, 0, some, others])
        return context.mask[:, 0].expand(rows, tokens, keys)
    if context.is_causal:
        assert tokens == keys
        return torch.ones(rows, tokens, keys, dtype=torch.bool).tril()
    return torch.ones(rows, tokens, keys, dtype=torch.bool)


def may_look(query, key, causal, window, is_sink):
    """The rules of the file's head, as indices in one row."""
    if causal and key > query:
        return False
    return window is None or query - window < key < query + window or is_sink


@pytest.mark.parametrize("seed", range(40))
def test_without_a_cache(seed):
    dice = random.Random(seed)
    B, T = dice.randint(1, 3), dice.choice([1, 2, 5, 9])
    causal, window, sinks = dice.random() < 0.7, dice.choice([None, 1, 2, 3, 20]), dice.choice([0, 1, 2, 4])
    documents = (
        [sorted(dice.randint(0, 2) for _ in range(T)) for _ in range(B)] if dice.random() < 0.5 else None
    )
    padding = [[dice.randint(0, 1) for _ in range(T)] for _ in range(B)] if dice.random() < 0.5 else None
    positions = [[dice.randint(0, 99) for _ in range(T)] for _ in range(B)] if dice.random() < 0.3 else None
    context = build_context(
        T, "cpu", causal=causal, window=window, sinks=sinks,
        position_ids=None if positions is None else torch.tensor(positions),
        document_ids=None if documents is None else torch.tensor(documents),
        padding_mask=None if padding is None else torch.tensor(padding),
    )  # fmt: skip
    ours = seen_by(context, B, T, T)
    for b in range(B):
        for q in range(T):
            for k in range(T):
                text = [
                    i for i in range(T)
                    if (documents is None or documents[b][i] == documents[b][k])
                    and (padding is None or padding[b][i])
                ]  # fmt: skip
                expected = may_look(q, k, causal, window, k in text[:sinks])
                expected &= documents is None or documents[b][q] == documents[b][k]
                expected &= padding is None or padding[b][k] == 1
                expected |= padding is not None and not padding[b][q]
                assert bool(ours[b, q, k]) == expected, (b, q, k)
    expected = torch.tensor(positions or [list(range(T))] * B)
    expected = expected if padding is None else expected * torch.tensor(padding)
    assert torch.equal(context.positions.expand(B, T), expected)


@pytest.mark.parametrize("seed", range(60))
def test_with_a_cache(seed):
    """Pieces of random sizes, ragged or not, with crops between: each real query sees exactly the tokens that
    the rules allow, each once, and the keys that come back are those very tokens."""
    dice = random.Random(seed)
    B, window, sinks = dice.randint(1, 3), dice.choice([None, 1, 2, 3, 7, 50]), dice.choice([0, 0, 1, 4])
    rolling = window is not None and dice.random() < 0.6
    margin = dice.choice([1, 2, 4, 16])
    if rolling:
        cache = RollingKVCache(1, B, window, 1, 2, torch.float64, "cpu", margin=margin, sinks=sinks)
        slots = cache.store.shape[4]
    else:
        cache = KVCache(1, B, 100, 1, 2, torch.float64, "cpu")
    lengths, most = [0] * B, [0] * B
    for _ in range(8):
        T = dice.choice([1, 1, 2, 3, 5, 9, 17])
        new = [dice.randint(0, T) for _ in range(B)] if dice.random() < 0.5 else None
        if max(lengths) + T > 100:
            break
        cache.begin(T, new)
        context = build_context(T, "cpu", window=window, cache=cache, sinks=sinks)
        real = new or [T] * B
        names = torch.full(
            (B, 1, T, 2), -7.0, dtype=torch.float64
        )  # a key's value is its own index; padding is -7
        for b in range(B):
            names[b, 0, : real[b]] = (lengths[b] + torch.arange(real[b], dtype=torch.float64))[:, None]
        keys, values = cache.append(0, names, names + 1000)
        mask = seen_by(context, B, T, keys.shape[2])
        for b in range(B):
            for t in range(real[b]):
                query = lengths[b] + t
                assert context.positions.expand(B, T)[b, t] == query
                got = keys[b, 0, mask[b, t], 0].tolist()
                seen = [k for k in range(query + 1) if may_look(query, k, True, window, k < sinks)]
                expected = [float(k) for k in seen]
                assert sorted(got) == expected, (b, t)
                assert values[b, 0, mask[b, t], 1].tolist() == [1000 + k for k in got]
        assert not mask.numel() or mask.any(dim=-1).all()  # padding, too, attends to something
        cache.advance()
        lengths = [old + n for old, n in zip(lengths, real, strict=True)]
        most = [max(pair) for pair in zip(most, lengths, strict=True)]
        assert cache.lengths == lengths
        if dice.random() < 0.4:
            reach = [m - margin if rolling and m > slots else 0 for m in most]
            lengths = [dice.randint(min(old, max(0, r)), old) for old, r in zip(lengths, reach, strict=True)]
            cache.crop(lengths)


def test_no_mask_where_none_is_needed():
    """Kernels are faster without one: whole causal rows, one token after a past, and everyone to everyone."""
    assert build_context(5, "cpu").is_causal
    assert build_context(5, "cpu", window=5).is_causal and build_context(5, "cpu", window=4).mask is not None
    assert build_context(5, "cpu", window=3, sinks=2).is_causal  # token 4 sees 2, 3, 4, and sinks 0, 1
    assert build_context(5, "cpu", window=3, sinks=1).mask is not None
    assert build_context(5, "cpu", window=3, sinks=2, causal=False).mask is not None  # 0 does not see 3
    free = build_context(5, "cpu", causal=False)
    assert free.mask is None and not free.is_causal
    cache = KVCache(1, 2, 9, 1, 2, torch.float32, "cpu")
    cache.begin(3)
    assert build_context(3, "cpu", cache=cache).is_causal
    cache.advance()
    cache.begin(1)
    one = build_context(1, "cpu", cache=cache)
    assert one.mask is None and not one.is_causal and one.positions.tolist() == [[3]]
    assert build_context(1, "cpu", cache=cache, window=4).mask is None
    assert build_context(1, "cpu", cache=cache, window=3).mask is not None
    cache.begin(2)
    assert build_context(2, "cpu", cache=cache).mask is not None


def test_rows_that_a_chat_loader_pads_leave_no_query_without_a_key():
    """Padding has a document of its own and is no key: kernels would divide 0 by 0 for it."""
    documents = torch.tensor([[0, 0, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0]])
    context = build_context(6, "cpu", document_ids=documents, padding_mask=documents >= 0, window=2)
    assert context.mask.any(dim=-1).all()
    assert not context.mask[0, 0, :4, 4:].any()  # and no real token sees padding


def test_all_layers_share_one_bias():
    """Eager attention adds 0 or -inf: built once per forward, not once per layer."""
    for rules in ({}, {"window": 2}):
        context = build_context(4, "cpu", **rules)
        bias = context.bias(torch.float32)
        assert context.bias(torch.float32) is bias and context.bias(torch.float64).dtype == torch.float64
        assert torch.equal(bias.expand(1, 1, 4, 4)[:, 0] == 0, seen_by(context, 1, 4, 4))
    assert build_context(4, "cpu", causal=False).bias(torch.float32) is None


def test_sinks_belong_to_each_document_and_are_no_padding():
    """Padding on the left, two documents, a prefix: written out."""
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    rules = {"window": 1, "sinks": 1, "document_ids": documents, "padding_mask": real, "prefix": 1}
    context = build_context(8, "cpu", **rules)
    rows = ["".join("#" if seen else "." for seen in row) for row in context.mask[0, 0].tolist()]
    assert rows == [
        "#########", "#.#......", "#.##.....", "#.#.#....",
        "#....#...", "#....##..", "#....#.#.", "#....#..#",
    ]  # fmt: skip
    bare = build_context(4, "cpu", window=1, sinks=1, prefix=1).mask[0, 0].tolist()
    assert ["".join("#" if seen else "." for seen in row) for row in bare] == [
        "##...", "###..", "##.#.", "##..#"
    ]  # fmt: skip
    without = context.without_prefix(1).mask
    assert torch.equal(without, build_context(8, "cpu", **rules | {"prefix": 0}).mask)


def test_a_cache_and_documents_do_not_go_together():
    cache = KVCache(1, 1, 9, 1, 2, torch.float32, "cpu")
    cache.begin(2)
    for name in ("document_ids", "padding_mask"):
        with pytest.raises(ValueError, match="need cache=None"):
            build_context(2, "cpu", cache=cache, **{name: torch.ones(1, 2)})
