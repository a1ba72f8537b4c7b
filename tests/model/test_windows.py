"""Sliding windows as a pattern of layers, and attention sinks: a whole model against Hugging Face's with the
same weights, and what its layers share."""

import pytest
import torch

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.tinyseek import TinySeek
from tests.model.test_tinyseek import text, twins
from tests.modules.tools import shake, small_config

PATTERN = {"sliding_window": 3, "sliding_window_pattern": 2, "num_hidden_layers": 4}


def masks(tokens, window, sinks):
    """Additive masks for Hugging Face, by kind of layer, from a loop over queries and keys."""
    full, local = torch.full((2, 1, 1, tokens, tokens), -torch.inf, dtype=torch.float64)
    for query in range(tokens):
        for key in range(query + 1):
            full[0, 0, query, key] = 0
            if query - key < window or key < sinks:
                local[0, 0, query, key] = 0
    return {"full_attention": full, "sliding_attention": local}


@pytest.mark.parametrize("every", [None, 2, 3])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@torch.no_grad()
def test_sinks_in_local_layers_only(every, sinks):
    """Against Qwen3 with these masks; its rotary tables and norms are fp32, which leaves a few 1e-6."""
    ours, theirs = twins(torch.float64, **PATTERN | {"sliding_window_pattern": every})
    ours.config.attention_sinks = sinks
    expected = theirs(text(1, 20), attention_mask=masks(20, 3, sinks)).logits
    torch.testing.assert_close(ours(text(1, 20)).logits, expected, rtol=0, atol=2e-5)
    ours.config.attention_sinks = sinks + 1  # and one token more would be seen
    assert (ours(text(1, 20)).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("every", [None, 2, 3])
def test_generation_as_in_transformers(every):
    """Greedy, across the window's edge, with the caches of both; prompts below the window and beyond."""
    ours, theirs = twins(torch.float64, seed=3, **PATTERN | {"sliding_window_pattern": every})
    for length in (2, 7):
        prompt = text(1, length, seed=length)
        expected = theirs.generate(
            prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, length:].tolist()
        params = SamplingParams(temperature=0, max_new_tokens=30)
        assert Generator(ours).generate([prompt[0].tolist()], params)[0] == expected
        assert len(set(expected)) > 2


@torch.no_grad()
def test_packed_documents_and_padding_are_each_text_alone():
    """Sinks are the first tokens of each document, also after padding on the left."""
    model = shake(TinySeek(small_config(**PATTERN, attention_sinks=2))).double().eval()
    texts = [text(1, length, seed=length) for length in (9, 12, 5)]
    documents = torch.tensor([[0] * 4 + [1] * 9 + [2] * 12 + [3] * 5])
    packed = torch.cat([text(1, 4, seed=9), *texts], dim=1)
    logits = model(packed, document_ids=documents, padding_mask=documents > 0).logits[:, 4:]
    expected = torch.cat([model(one).logits for one in texts], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    left = model(packed[:, :13], padding_mask=documents[:, :13] > 0).logits[:, 4:]
    torch.testing.assert_close(left, expected[:, :9], rtol=0, atol=1e-12)


@torch.no_grad()
def test_layers_with_the_same_window_share_one_context():
    model, seen = TinySeek(small_config(**PATTERN | {"num_hidden_layers": 5})), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[1]))
    context = model.model(text(2, 9)).context
    local, whole = seen[0], seen[1]
    assert [one is local for one in seen] == [True, False, True, False, True]
    assert [one is whole for one in seen] == [False, True, False, True, False]
    assert whole.is_causal and local.mask is not None and context is whole  # MTP sees all
