"""Rotary embeddings against Hugging Face's Llama code, a loop over complex numbers, and the property they
exist for."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from modules.rope import RotaryEmbedding, apply_rotary
from tests.modules.tools import slow_rotation


def odd_positions(B, T):
    """Positions that neither start at zero nor rise by one."""
    return torch.randint(0, 500, (B, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("head_dim, theta", [(2, 10000.0), (8, 10000.0), (64, 5e5), (128, 1e6)])
def test_half_split_is_hugging_faces(head_dim, theta):
    torch.manual_seed(0)
    config = LlamaConfig(head_dim=head_dim, hidden_size=64, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    positions = odd_positions(2, 7)
    q, k = torch.randn(2, 3, 7, head_dim), torch.randn(2, 1, 7, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    ours = RotaryEmbedding(head_dim, theta)(positions)
    assert torch.equal(ours[0], cos) and torch.equal(ours[1], sin)
    for a, b in zip((apply_rotary(q, *ours), apply_rotary(k, *ours)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_both_pairings_are_the_complex_loop(interleaved, rows):
    """Also with one table for all rows (B or 1)."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    positions = odd_positions(rows, 5)
    rope = RotaryEmbedding(6, 100.0, interleaved=interleaved).double()
    ours = apply_rotary(x, *rope(positions), interleaved)
    inv_freq = [100.0 ** (-2 * i / 6) for i in range(3)]
    slow = slow_rotation(x.detach(), positions.expand(2, 5), inv_freq, interleaved)
    torch.testing.assert_close(
        ours, slow, rtol=0, atol=1e-4
    )  # our frequencies are rounded to fp32, as theirs are
    slow = slow_rotation(x.detach(), positions.expand(2, 5), rope.inv_freq, interleaved)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *rope(positions), interleaved), (x,))


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved):
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    rope = RotaryEmbedding(32, interleaved=interleaved).double()

    def score(a, b):
        tables = [rope(torch.tensor([[place]])) for place in (a, b)]
        turned = [apply_rotary(x, *t, interleaved) for x, t in zip((q, k), tables, strict=True)]
        return (turned[0] * turned[1]).sum()

    near = score(7, 3)
    for shift in (1, 100, 3000):
        torch.testing.assert_close(score(7 + shift, 3 + shift), near, rtol=0, atol=1e-11)
    assert (score(8, 3) - near).abs() > 1e-3


def test_casting_a_model_does_not_round_the_angles():
    """bf16 keeps 8 bits: a frequency rounded to it is off by whole turns at position 1000."""
    positions = torch.tensor([[0, 257, 999, 4095]])
    cos, sin = RotaryEmbedding(64)(positions)
    for cast in (torch.bfloat16, torch.float16):
        rope = RotaryEmbedding(64).to(cast)
        assert torch.equal(rope(positions)[0], cos) and torch.equal(rope(positions)[1], sin)
        assert rope(positions)[0].dtype == torch.float32
    assert RotaryEmbedding(64).bfloat16().float().inv_freq.equal(RotaryEmbedding(64).inv_freq)
    assert RotaryEmbedding(64).double()(positions)[0].dtype == torch.float64
    meta = RotaryEmbedding(64).to("meta").to_empty(device="cpu")
    assert torch.equal(meta(positions)[0], cos)
    assert not RotaryEmbedding(64).state_dict()


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_bf16_only_the_result_is_rounded(interleaved):
    """Half a unit in the last place (2^-8), and 1e-4 for fp32 angles of up to 500: tables in bf16 are off by
    more."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 7, 64).bfloat16().requires_grad_(), odd_positions(2, 7)
    rope = RotaryEmbedding(64, interleaved=interleaved)
    exact_x = x.detach().double().requires_grad_()
    exact = apply_rotary(exact_x, *rope.double()(positions), interleaved)
    ours = apply_rotary(x, *rope.float()(positions), interleaved)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-4)
    upstream = torch.randn_like(x)
    ours.backward(upstream), exact.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=2**-8, atol=1e-4)
