"""Partial rotary embeddings against two families that have them, Phi-3 (half-split, with LongRoPE) and GLM
(interleaved), and against a loop over complex numbers."""

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, Phi3Config, Phi3ForCausalLM

from model.tinyseek import TinySeek
from modules.rope import RotaryEmbedding, apply_rotary
from tests.model.test_tinyseek import text
from tests.modules.tools import shake, slow_rotation, small_config
from utils.errors import UserError

LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.3, 2.1], "long_factor": [1.1, 4.0, 9.0],
    "original_max_position_embeddings": 8,
}  # fmt: skip


def joined(state, parts, name):
    """Replace the weights of `parts` by one, as both families store them."""
    for key in [key for key in state if key.endswith(f"{parts[0]}.weight")]:
        front = key.removesuffix(f"{parts[0]}.weight")
        state[f"{front}{name}.weight"] = torch.cat([state.pop(f"{front}{part}.weight") for part in parts])


def twins(family, share, scaling):
    """Our model and Hugging Face's with the same random weights, in fp64, without QK-norm."""
    shape = {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }  # fmt: skip
    glm = family == "GLM"
    ours = shake(TinySeek(small_config(
        **shape, head_dim=8, qk_norm=False, partial_rotary_factor=share, rope_scaling=scaling,
        rope_interleaved=glm,
    ))).double()  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share, **(scaling or {})}
    kind, extra = (GlmConfig, {"head_dim": 8, "attention_bias": False}) if glm else (Phi3Config, {})
    if not glm:
        extra["original_max_position_embeddings"] = 8
    config = kind(**shape, **extra, rope_parameters=rope, pad_token_id=0, attn_implementation="eager")
    theirs = (GlmForCausalLM if glm else Phi3ForCausalLM)(config).double()
    state = dict(ours.state_dict())
    joined(state, ["mlp.gate_proj", "mlp.up_proj"], "mlp.gate_up_proj")
    if not glm:
        joined(state, [f"self_attn.{one}_proj" for one in "qkv"], "self_attn.qkv_proj")
    theirs.load_state_dict(state, strict=True)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("tokens", [8, 9, 20])
@pytest.mark.parametrize(
    "family, share, scaling",
    [("Phi-3", 0.75, None), ("Phi-3", 0.75, LONGROPE), ("Phi-3", 0.8, LONGROPE | {"attention_factor": 1.4}),
     ("Phi-3", 0.25, None), ("GLM", 0.5, None), ("GLM", 0.75, {"rope_type": "linear", "factor": 3.0}),
     ("GLM", 0.75, LONGROPE | {"factor": 2.0}), ("GLM", 1.0, None)],
)  # fmt: skip
@torch.no_grad()
def test_logits_are_hugging_faces(family, share, scaling, tokens):
    """Within the trained length and beyond it; 0.8 of 8 channels are 6. Their tables, norms and softmax round
    to fp32, which without QK-norm moves a logit by up to 1e-5; rotating one channel more moves it by 0.1."""
    ours, theirs = twins(family, share, scaling)
    expected = theirs(text(2, tokens)).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(text(2, tokens)).logits, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_first_channels_are_the_complex_loop_and_the_rest_pass(interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(0, 500, (2, 5))
    rope = RotaryEmbedding(6, 100.0, interleaved=interleaved).double()
    ours = apply_rotary(x, *rope(positions), interleaved)
    slow = slow_rotation(x.detach()[..., :6], positions, rope.inv_freq, interleaved)
    torch.testing.assert_close(ours[..., :6], slow, rtol=0, atol=1e-12)
    assert torch.equal(ours[..., 6:], x[..., 6:])
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *rope(positions), interleaved), (x,))
    assert apply_rotary(x.detach().bfloat16(), *rope.float()(positions), interleaved).dtype == torch.bfloat16


def test_the_setting():
    """As a field or where Hugging Face's files have it; the field holds it in the end."""
    inside = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    for config in (
        small_config(rope_scaling=inside),
        small_config(rope_scaling=inside, partial_rotary_factor=0.5),
        small_config(rope_scaling={"rope_type": "linear", "factor": 2.0}, partial_rotary_factor=0.5),
    ):
        assert (config.partial_rotary_factor, config.rotary_dim) == (0.5, 4)
        assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
        assert len(TinySeek(config).model.rotary_emb.inv_freq) == 2
    assert inside["partial_rotary_factor"] == 0.5  # the caller's dictionary is not changed
    assert small_config(rope_scaling={"partial_rotary_factor": 0.5}).rope_scaling is None
    assert small_config(rope_scaling={"partial_rotary_factor": None}).partial_rotary_factor == 1.0
    assert small_config().rotary_dim == 8
    assert small_config(head_dim=20, partial_rotary_factor=0.3).rotary_dim == 6
    mla = {"attention_kind": "mla", "qk_rope_head_dim": 6}
    assert small_config(**mla, rope_scaling={"partial_rotary_factor": 1.0}).rotary_dim == 6
    for changes, words in (
        ({"partial_rotary_factor": 0.4}, "0.4 rotates 3 channels of 8"),
        ({"partial_rotary_factor": 0.1}, "rotates 0 channels"),
        ({"partial_rotary_factor": 0.0}, "above 0"),
        ({"partial_rotary_factor": 1.5}, "at most 1"),
        ({"rope_scaling": {"partial_rotary_factor": 1.5}}, "rope_scaling: partial_rotary_factor=1.5"),
        ({"rope_scaling": {"partial_rotary_factor": "half"}}, "rope_scaling: partial_rotary_factor must be"),
        ({"rope_scaling": inside, "partial_rotary_factor": 0.25}, "contradicts model.partial_rotary_factor"),
        (mla | {"partial_rotary_factor": 0.5}, "qk_rope_head_dim"),
        (mla | {"rope_scaling": {"partial_rotary_factor": 0.5}}, "qk_rope_head_dim"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            small_config(**changes)
        assert "\n" not in str(caught.value)
