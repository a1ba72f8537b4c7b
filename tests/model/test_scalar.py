"""The decoder with one output against Hugging Face's `Qwen3ForSequenceClassification`, which TRL trains as a
reward model."""

import pytest
import torch

from model.scalar import ScalarModel
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config
from utils.errors import UserError
from utils.checkpoint import load_weights


def test_equals_hugging_face():
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    config = small_config()
    ours = shake(ScalarModel(config), 3).double().eval()
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "intermediate_size rms_norm_eps max_position_embeddings"
    )
    theirs = Qwen3ForSequenceClassification(
        Qwen3Config(
            **{name: getattr(config, name) for name in same.split()}, num_labels=1, pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )  # fmt: skip
    ).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = torch.randint(1, 61, (4, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 1, 5, 8])
    ids[torch.arange(9) >= lengths[:, None]] = 0
    scores = ours(ids, padding_mask=ids != 0)  # (B, T)
    assert scores.shape == (4, 9)
    expected = theirs(ids, attention_mask=(ids != 0).long()).logits[:, 0]  # (B,), each row's last real token
    # Hugging Face computes rotary angles and norms in fp32.
    assert torch.allclose(scores[torch.arange(4), lengths - 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"mtp": "sequential", "tie_word_embeddings": False}], ids=str)
def test_from_a_policy(changes):
    """The same hidden states in another memory, and a score of zero everywhere; the head can learn."""
    policy = shake(TinySeek(small_config(**changes)), 1).eval()
    scalar = ScalarModel.from_policy(policy).eval()
    ids = torch.arange(10).view(2, 5)
    assert not scalar(ids).any()
    scalar(ids).sum().backward()
    hidden = policy(ids).hidden.detach()
    assert torch.allclose(scalar.score.weight.grad[0], hidden.sum((0, 1)), atol=1e-5)
    with torch.no_grad():
        scalar.model.norm.weight += 1
    assert torch.equal(policy(ids).hidden, hidden)


def test_scores_are_not_rounded_by_autocast():
    """Under autocast the head still multiplies in fp32: bf16 would make close rewards equal."""
    scalar = shake(ScalarModel(small_config()), 2).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = scalar.model(ids).hidden
        scores = scalar(ids)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, hidden.float() @ scalar.score.weight[0], atol=1e-6)


def test_weights_of_another_kind_are_refused():
    policy = TinySeek(small_config())
    with pytest.raises(UserError, match=r"missing \(score.weight\)"):
        load_weights(ScalarModel(policy.config), policy.state_dict(), "a policy")
