"""What each way to stretch a context changes, and that the result can be built."""

from dataclasses import asdict

import pytest
import torch

from config.extension import METHODS, stretched
from config.model import ModelConfig
from model.tinyseek import TinySeek
from utils.errors import UserError

SHAPE = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8, "max_position_embeddings": 32}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_a_model_for_the_new_length(method):
    """Only the first chunk or window is as before, and, for methods that do not stretch, all of it."""
    before, after = ModelConfig(**SHAPE), stretched(ModelConfig(**SHAPE), method, 128)
    changed = {key for key, value in asdict(after).items() if value != getattr(before, key)}
    expected = {
        "plain": set(), "abf": {"rope_theta"}, "dca": {"dual_chunk_attention_config"},
        "window": {"sliding_window", "attention_sinks"},
    }.get(method, {"rope_scaling"})  # fmt: skip
    assert changed == expected | {"max_position_embeddings"}
    after.check()
    torch.manual_seed(0)
    base = TinySeek(before).eval()
    model = TinySeek(after).eval()
    model.load_state_dict(base.state_dict())
    ids = torch.randint(30, (1, 100))
    short = base(ids[:, :20]).logits - model(ids[:, :20]).logits
    assert torch.isfinite(model(ids).logits).all()
    same = {"plain", "dynamic", "dca", "window"}
    assert (short.abs().max() < 1e-5) == (method in same), short.abs().max()


def test_the_factor_of_yarn_is_that_of_the_lengths():
    scaling = stretched(ModelConfig(**SHAPE), "yarn", 128).rope_scaling
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("method, length, changes, words", [
    ("yarn", 32, {}, "32 tokens is no extension"),
    ("other", 64, {}, "known: plain, linear"),
    ("yarn", 64, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "extend its base instead"),
    ("dca", 64, {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 2}}, "extend its base"),
    ("dca", 64, {"attention_kind": "mla"}, "needs model.attention_kind=gqa"),
])  # fmt: skip
def test_what_cannot_be_extended(method, length, changes, words):
    with pytest.raises(UserError, match=words):
        stretched(ModelConfig(**SHAPE | changes), method, length)
