"""The whole decoder against Hugging Face's `Qwen3ForCausalLM` holding the same random weights under the same
names."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from model.caches import make_cache
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
    "bias": {"attention_bias": True, "tie_word_embeddings": False},
    "MHA": {"num_key_value_heads": 4, "head_dim": None},
    "MQA, yarn": {"num_key_value_heads": 1, "rope_scaling": YARN},
    "one head, one layer": {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1},
    "window": {"sliding_window": 3, "num_hidden_layers": 3},
    "pattern": {"sliding_window": 3, "sliding_window_pattern": 2, "num_hidden_layers": 5},
    "dynamic": {"rope_scaling": DYNAMIC, "max_position_embeddings": 6},
    "eager": {"attn_implementation": "eager", "sliding_window": 4},
}


def twins(dtype=torch.float32, seed=1, **changes):
    """Our model and Hugging Face's, with the same random weights, loaded strictly."""
    config = small_config(**changes)
    ours = shake(TinySeek(config), seed)
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "intermediate_size rms_norm_eps max_position_embeddings attention_bias "
        "tie_word_embeddings sliding_window"
    )
    windowed, every = config.sliding_window is not None, config.sliding_window_pattern or 99
    local = [windowed and (n + 1) % every != 0 for n in range(config.num_hidden_layers)]
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            **{name: getattr(config, name) for name in same.split()},
            use_sliding_window=config.sliding_window is not None,
            layer_types=["sliding_attention" if one else "full_attention" for one in local],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                **(config.rope_scaling or {}),
            },
            attn_implementation="eager",
        )
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def text(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 11])
@torch.no_grad()
def test_logits(name, tokens):
    """Also past the trained length, with yarn and dynamic NTK."""
    ours, theirs = twins(**SHAPES[name])
    expected = theirs(text(2, tokens)).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(text(2, tokens)).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours(text(2, tokens), last_only=True).logits, expected[:, -1:], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_every_gradient(name):
    """Labels already shifted, ours, against labels that Hugging Face shifts itself; some positions
    unlabelled."""
    ours, theirs = twins(**SHAPES[name])
    ids = text(2, 11)
    theirs_labels = ids.clone()
    theirs_labels[0, :4], theirs_labels[1, -3:] = -100, -100
    labels = F.pad(theirs_labels[:, 1:], (0, 1), value=-100)
    expected = theirs(ids, labels=theirs_labels).loss  # a mean
    out = ours(ids, labels=labels)
    count = int((labels != -100).sum())
    assert out.logits is None and len(out.nll) == count
    torch.testing.assert_close(out.loss_sum / count, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.nll.mean(), expected.detach(), rtol=1e-5, atol=1e-6)
    expected.backward()
    (out.loss_sum / count).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    assert set(gradients) == {n for n, _ in ours.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        grad = gradients[parameter_name]
        assert grad.abs().max() > 0, parameter_name
        torch.testing.assert_close(
            parameter.grad, grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN, "sliding_window": 3}], ids=str)
@torch.no_grad()
def test_in_double_precision(changes):
    """What is left in fp32 is rounding: in fp64 the difference is the 1e-7 of Hugging Face's fp32 rotary
    tables and norms."""
    ours, theirs = twins(torch.float64, **changes)
    torch.testing.assert_close(ours(text(2, 11)).logits, theirs(text(2, 11)).logits, rtol=0, atol=3e-6)


def test_the_same_file_fits_both():
    """Names and shapes are Qwen3's, tied or not; nothing else is stored."""
    for tied in (True, False):
        ours, theirs = twins(tie_word_embeddings=tied)
        shapes = {n: tuple(v.shape) for n, v in theirs.state_dict().items()}
        assert shapes == {n: tuple(v.shape) for n, v in ours.state_dict().items()}
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
        assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, {"attn_implementation": "eager"}], ids=str)
@torch.no_grad()
def test_padding(changes):
    """Right and left padding against Hugging Face's `attention_mask`, and each row against itself without
    padding."""
    ours, theirs = twins(**changes)
    for side in ("left", "right"):
        mask, ids = torch.ones(2, 9, dtype=torch.long), text(2, 9)
        gap = slice(0, 4) if side == "left" else slice(5, 9)
        real = slice(4, 9) if side == "left" else slice(0, 5)
        mask[1, gap] = 0
        ids[1, gap] = 60
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, padding_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1, real], expected[1, real], rtol=1e-5, atol=1e-5)
        alone = theirs(ids[1:, real]).logits[0]
        torch.testing.assert_close(got[1, real], alone, rtol=1e-5, atol=1e-5)
        shifted = ours(
            ids, padding_mask=mask
        ).logits  # positions that count the padding too: RoPE sees distance only
        torch.testing.assert_close(shifted[1, real], alone, rtol=1e-4, atol=1e-4)
        assert got.isfinite().all() and shifted.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, {"attn_implementation": "eager"}], ids=str)
def test_packed_documents_are_documents_alone(changes):
    """Loss and gradients of two texts in one row equal those of Hugging Face's model on each text by
    itself."""
    ours, theirs = twins(**changes)
    first, second = text(1, 6, seed=1), text(1, 5, seed=2)
    packed, documents = torch.cat([first, second], 1), torch.tensor([[0] * 6 + [1] * 5])
    labels = torch.cat([F.pad(t[:, 1:], (0, 1), value=-100) for t in (first, second)], 1)
    with torch.no_grad():
        logits = ours(packed, document_ids=documents).logits
        alone = torch.cat([theirs(first).logits, theirs(second).logits], 1)
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=2e-5)
    ours(packed, labels=labels, document_ids=documents).loss_sum.backward()
    (theirs(first, labels=first).loss * 5 + theirs(second, labels=second).loss * 4).backward()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_generation_is_hugging_faces():
    for changes in ({}, {"sliding_window": 3}, {"rope_scaling": YARN, "num_key_value_heads": 1}):
        ours, theirs = twins(torch.float64, **changes)
        prompt = text(2, 4, seed=3)
        expected = theirs.generate(
            prompt, max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        cache, piece, row = make_cache(ours, 2, 18), prompt, prompt
        for _ in range(14):
            piece = ours(piece, cache=cache, last_only=True).logits.argmax(-1)
            row = torch.cat([row, piece], dim=1)
        assert torch.equal(row, expected)


def test_no_label_no_loss_no_nan():
    ours, _ = twins()
    out = ours(text(2, 5), labels=torch.full((2, 5), -100))
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0 and len(out.nll) == 0
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


@torch.no_grad()
def test_the_soft_cap_bounds_logits_and_loss_alike():
    ours, theirs = twins(final_logit_softcapping=2.0)
    ids = text(2, 7)
    expected = 2.0 * torch.tanh(theirs(ids).logits / 2.0)
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(expected.flatten(0, 1), ids.flatten(), reduction="sum")
    torch.testing.assert_close(ours(ids, labels=ids).loss_sum, loss, rtol=1e-5, atol=1e-4)


def test_autocast_training_is_near_the_exact_gradient():
    """bf16 products, fp32 sums: the direction of the whole gradient agrees with fp64 within two degrees or
    so."""
    ours, theirs = twins(torch.float64)
    ids = text(4, 20)
    theirs_loss = theirs(ids, labels=ids).loss
    theirs_loss.backward()
    low = ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = low(ids, labels=F.pad(ids[:, 1:], (0, 1), value=-100))
    (out.loss_sum / (4 * 19)).backward()
    assert (out.loss_sum / 76).item() == pytest.approx(theirs_loss.item(), rel=0.01)
    other = dict(theirs.named_parameters())
    mine = torch.cat([p.grad.flatten().double() for p in low.parameters()])
    real = torch.cat([other[n].grad.flatten() for n, _ in low.named_parameters()])
    assert F.cosine_similarity(mine, real, dim=0) > 0.999


# ---- initialisation, dropout, determinism


def test_initial_weights():
    """Standard deviations over enough numbers to tell 0.02 from anything near; gains one, biases zero."""
    torch.manual_seed(0)
    config = small_config(
        vocab_size=500, hidden_size=128, intermediate_size=256, head_dim=32, attention_bias=True,
        initializer_range=0.05, tie_word_embeddings=False,
    )  # fmt: skip
    for name, parameter in TinySeek(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            n = parameter.numel()
            assert parameter.std().item() == pytest.approx(0.05, rel=4 / math.sqrt(2 * n)), name
            assert abs(parameter.mean().item()) < 4 * 0.05 / math.sqrt(n), name


@torch.no_grad()
def test_a_fresh_model_guesses_evenly():
    torch.manual_seed(0)
    model = TinySeek(small_config(vocab_size=500))
    ids = torch.randint(0, 500, (4, 16))
    assert model(ids, labels=ids.roll(-1, 1)).nll.mean().item() == pytest.approx(math.log(500), abs=0.05)


def test_zero_init_residual_starts_as_the_identity():
    torch.manual_seed(0)
    model = TinySeek(small_config(zero_init_residual=True, attention_bias=True))
    ids = text(2, 7)
    embedded = model.model.embed_tokens(ids)
    expected = F.rms_norm(embedded, (24,), eps=1e-6) @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    model(ids, labels=ids).loss_sum.backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not parameter.any() and parameter.grad.abs().max() > 0, name  # zero, but it learns at once
        elif name.endswith("_proj.weight"):
            assert parameter.any(), name


def test_dropout_only_in_training():
    model = TinySeek(small_config(dropout=0.3, attention_dropout=0.3))
    plain = TinySeek(small_config())
    plain.load_state_dict(model.state_dict())
    ids = text(2, 7)
    assert torch.equal(model.eval()(ids).logits, plain.train()(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(5)
    first = model(ids).logits
    torch.manual_seed(5)
    assert torch.equal(model(ids).logits, first)


def test_the_embedding_and_both_blocks_are_dropped_at_their_rate():
    """Each of the three places, looked at from outside by a hook: a share p is zero, the rest scaled by
    1/(1-p)."""
    torch.manual_seed(0)
    model = TinySeek(small_config(dropout=0.25, hidden_size=64, num_hidden_layers=1)).train()
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _, given, out: calls.append((given[0], out)))
    model(text(8, 32))
    assert len(calls) == 3
    for given, out in calls:
        kept = out != 0
        assert 1 - kept.double().mean().item() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(out[kept], given[kept] / 0.75)


def test_a_seed_decides_everything():
    def weights(seed):
        torch.manual_seed(seed)
        return TinySeek(small_config()).state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
