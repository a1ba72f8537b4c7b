"""States and attention that the recorder notes, against transformers with the same weights.

There softmax, norms and rotations are rounded to fp32 whatever the weights are: 1e-5 apart at most, for
states of about 10.
"""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from model.tinyseek import TinySeek
from modules.checkpointing import checkpoint_layers
from tests.modules.tools import shake, small_config
from train.engine.recorder import Recorder

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))


def model_and_twin():
    """Ours and theirs, in fp64; 4 heads on 2 of 8 channels."""
    model = shake(TinySeek(small_config(num_hidden_layers=3, tie_word_embeddings=False))).double().eval()
    c = model.config
    theirs = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=False, attn_implementation="eager", pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    return model, theirs.double().eval()


@pytest.mark.parametrize("padded", [False, True])
def test_states_and_maps_are_those_of_transformers(padded):
    model, theirs = model_and_twin()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 1 - padded
    expected = theirs(IDS, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for layer in (0, 1, 2):
        with Recorder(model, [0, 1], layer) as seen:
            model(IDS, padding_mask=mask.bool() if padded else None)
        found = (seen.scores() + seen.bias()).softmax(-1)
        real = mask.bool()[:, None, :, None]
        torch.testing.assert_close(found * real, expected.attentions[layer] * real, rtol=0, atol=1e-5)
        for ours, wanted in zip(seen.hidden, expected.hidden_states[1:3], strict=True):
            real = mask.bool()[..., None]
            torch.testing.assert_close(ours * real, wanted * real, rtol=0, atol=1e-5)


def test_queries_keys_and_values_before_the_rotation():
    model, _ = model_and_twin()
    with Recorder(model, [], 1) as seen:
        model(IDS)
        inputs = seen.found["context"]
    assert inputs.is_causal and [part.shape[2:] for part in seen.heads] == [(4, 8), (2, 8), (2, 8)]
    caught = []
    attention = model.model.layers[1].self_attn
    handle = attention.register_forward_pre_hook(lambda part, given: caught.append(given[0]))
    model(IDS)
    handle.remove()
    for ours, wanted in zip(seen.heads, attention.project(caught[0]), strict=True):
        assert torch.equal(ours, wanted.transpose(1, 2))


def test_nothing_is_left_behind():
    """No hook, even after an error, and the same output with and without; also where layers are computed
    twice, with the same gradients."""
    model, _ = model_and_twin()
    plain = model(IDS).logits
    with pytest.raises(IndexError), Recorder(model, [0], 0):
        model(IDS + 1000)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    gradients = []
    for twice in (False, True):
        checkpoint_layers(model, twice)
        with Recorder(model, [0, 2], 1) as seen:
            assert torch.equal(model(IDS).logits, plain)
        loss = seen.scores().square().sum() + sum(state.square().sum() for state in seen.hidden)
        gradients.append(torch.autograd.grad(loss, model.parameters(), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or torch.equal(one, other)
