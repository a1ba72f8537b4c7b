"""The latent cache against rows kept as plain Python lists, and against published numbers."""

import random

import pytest
import torch

from modules.attention.cache import KVCache
from modules.attention.latent_cache import LatentCache


def test_bytes_per_token_are_those_of_deepseek_v3():
    """61 layers of 512 + 64 numbers in bf16: 70,272 bytes a token. With 128 heads of 128 and no latents it
    would be 57 times as much; V2 (60 layers) has the same width."""
    v3 = LatentCache(61, 1, 1, 512, 64, torch.bfloat16, "cpu")
    assert v3.bytes == 70_272
    assert LatentCache(60, 3, 10, 512, 64, torch.float32, "cpu").bytes == 3 * 10 * 60 * 576 * 4
    assert KVCache(61, 1, 1, 128, 128, torch.bfloat16, "cpu").bytes // v3.bytes == 56


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_rows_hold_what_a_list_would(seed):
    """Rounds of random sizes, some rows resting, some cropped: each row shows the vectors that were put in,
    in order, and both layers keep apart."""
    dice, B, capacity = random.Random(seed), 3, 17
    cache = LatentCache(2, B, capacity, 4, 2, torch.float64, "cpu")
    rows = [[[] for _ in range(B)] for _ in range(2)]  # layer, row, token
    address, taken = cache.store.data_ptr(), cache.bytes
    for _ in range(40):
        tokens = dice.randint(1, 5)
        new = [min(dice.randint(0, tokens), capacity - length) for length in cache.lengths]
        same = dice.random() < 0.4 and max(cache.lengths) + tokens <= capacity
        before = list(cache.lengths)
        cache.begin(tokens, None if same else new)
        new = [tokens] * B if same else new
        uniform = same and len(set(before)) == 1
        assert cache.uniform_past == (before[0] if uniform else None)
        for layer in range(2):
            latents = torch.randn(B, 1, tokens, 6, dtype=torch.float64)
            seen = cache.append(layer, latents)
            assert seen.shape == (B, 1, max(p + n for p, n in zip(before, new, strict=True)), 6)
            for b in range(B):
                rows[layer][b] += list(latents[b, 0, : new[b]])
                held = torch.stack(rows[layer][b]) if rows[layer][b] else torch.zeros(0, 6)
                assert torch.equal(seen[b, 0, : before[b] + new[b]], held.double())
        for b in range(B):
            index = cache.query_index.expand(B, -1)[b].tolist()
            assert index == list(range(before[b], before[b] + tokens))
        assert cache.key_index.tolist() == [list(range(seen.shape[2]))]
        assert cache.lengths == before
        cache.advance()
        assert cache.lengths == [len(row) for row in rows[0]]
        if dice.random() < 0.4:
            lengths = [dice.randint(0, length) for length in cache.lengths]
            if dice.random() < 0.5:
                lengths = [min(lengths)] * B
            cache.crop(lengths)
            rows = [[row[:n] for row, n in zip(layer, lengths, strict=True)] for layer in rows]
    assert cache.bytes == taken and cache.store.data_ptr() == address


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_prefix_stands_in_front(rows):
    prefix, new = torch.randn(2, rows, 1, 3, 6), torch.randn(2, 2, 1, 2, 6)
    cache = LatentCache(2, 2, 5, 4, 2, torch.float32, "cpu")
    for layer in range(2):
        cache.start_with(layer, prefix[layer])
    assert cache.lengths == [3, 3]
    cache.begin(2)
    assert cache.uniform_past == 3
    for layer in range(2):
        both = torch.cat([prefix[layer].expand(2, -1, -1, -1), new[layer]], dim=2)
        assert torch.equal(cache.append(layer, new[layer]), both)
    cache.advance()
    with pytest.raises(ValueError, match="already holds"):
        cache.start_with(0, prefix[0])
    with pytest.raises(ValueError, match="does not fit"):
        LatentCache(2, 2, 2, 4, 2, torch.float32, "cpu").start_with(0, prefix[0])


@torch.no_grad()
def test_what_does_not_fit_is_said():
    cache = LatentCache(1, 2, 4, 4, 2, torch.float32, "cpu")
    with pytest.raises(ValueError, match="holds 4 tokens"):
        cache.begin(5)
    cache.begin(5, [4, 2])  # padding takes no room
    cache.append(0, torch.ones(2, 1, 5, 6))
    cache.advance()
    assert cache.lengths == [4, 2] and cache.capacity == 4
    with pytest.raises(ValueError, match="larger capacity"):
        cache.begin(1)
    with pytest.raises(ValueError, match="cropped"):
        cache.crop([4, 3])
