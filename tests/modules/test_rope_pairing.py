"""Weights converted to the other pairing give the same logits, in our model and in Hugging Face's."""

import pytest
import torch

from model.tinyseek import TinySeek
from modules.rope_pairing import other_pairing
from tests.model import test_moe_model
from tests.model.test_tinyseek import text
from tests.modules.test_rope_partial import joined, twins
from tests.modules.tools import shake, small_config
from utils.errors import UserError

MLA = test_moe_model.SHAPES["DeepseekV3, queries compressed"] | {"attention_bias": True}
MODELS = {
    "biases and QK-norm": {"attention_bias": True, "num_hidden_layers": 1},
    "MQA without QK-norm": {"num_key_value_heads": 1, "qk_norm": False},
    "half of the channels": {"head_dim": 12, "partial_rotary_factor": 0.5, "attention_bias": True},
    "MTP": {"mtp": "sequential", "tie_word_embeddings": False},
    "MLA": MLA,
    "MLA, queries not compressed": test_moe_model.MLA | {"mtp": "sequential"},
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_same_logits_in_the_other_pairing(name, interleaved):
    """Random gains and biases; without the conversion, or without that of one weight, the logits differ."""
    flags = (interleaved, not interleaved)
    config, other = (small_config(**MODELS[name], rope_interleaved=flag) for flag in flags)
    model, ids = shake(TinySeek(config)).double().eval(), text(2, 9)
    state, twin = model.state_dict(), TinySeek(other).double().eval()

    def outputs(model):
        loss = model(ids, labels=ids, mtp=model.mtp is not None)
        return model(ids).logits, loss.mtp_loss_sum if model.mtp else loss.loss_sum

    moved, expected = other_pairing(state, config), outputs(model)
    twin.load_state_dict(moved)
    torch.testing.assert_close(outputs(twin), expected, rtol=0, atol=1e-11)
    changed = [key for key in state if not torch.equal(state[key], moved[key])]
    for key in changed:
        twin.load_state_dict(moved | {key: state[key]})
        logits, loss = outputs(twin)
        assert (logits - expected[0]).abs().max() > 1e-4 or (loss - expected[1]).abs() > 1e-4, key
    back = other_pairing(moved, other)
    assert all(torch.equal(back[key], state[key]) for key in state) and list(back) == list(state)


@torch.no_grad()
def test_phi_and_glm_agree():
    """Hugging Face's Phi-3 is half-split, its GLM interleaved: with converted weights, one is the other."""
    (ours, phi), (_, glm) = twins("Phi-3", 0.75, None), twins("GLM", 0.75, None)
    weights = other_pairing(ours.state_dict(), ours.config)
    joined(weights, ["mlp.gate_proj", "mlp.up_proj"], "mlp.gate_up_proj")
    glm.load_state_dict(weights)
    torch.testing.assert_close(glm(text(2, 9)).logits, phi(text(2, 9)).logits, rtol=0, atol=5e-5)


def test_the_published_permutation():
    """Meta's weights to Hugging Face's: `view(heads, D // 2, 2, C).transpose(1, 2)`."""
    config = small_config(rope_interleaved=True)
    weight = torch.randn(4 * 8, 24)
    moved = other_pairing({"self_attn.q_proj.weight": weight}, config)["self_attn.q_proj.weight"]
    assert torch.equal(moved, weight.view(4, 4, 2, 24).transpose(1, 2).reshape(32, 24))


@torch.no_grad()
def test_deepseek_interleaved_and_not():
    """Hugging Face's model has a switch: interleaved, with our half-split weights converted."""
    ours, _ = test_moe_model.twins("DeepseekV3, queries compressed", torch.float64)
    _, theirs = test_moe_model.twins("DeepseekV3, queries compressed", torch.float64, rope_interleaved=True)
    weights = other_pairing(ours.state_dict(), ours.config)
    empty = {key: value for key, value in theirs.state_dict().items() if not value.numel()}
    theirs.load_state_dict(weights | empty)
    torch.testing.assert_close(ours(text(2, 9)).logits, theirs(text(2, 9)).logits, rtol=0, atol=1e-5)


def test_adapters_are_refused():
    for name in ("model.layers.0.self_attn.q_proj.lora_B.default", "prefix.keys"):
        with pytest.raises(UserError, match="adapter"):
            other_pairing({name: torch.zeros(8, 8)}, small_config())
