"""The encoder against Hugging Face's `BertForMaskedLM` and `ModernBertForMaskedLM` with the same random
weights, gains and biases, and what neither padding nor packing may change."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from config.checks import validate_section
from config.encoder import EncoderConfig
from model.encoder import Encoder, MaskedLM
from modules.checkpointing import checkpoint_layers
from tests.modules.tools import shake

BERT = {
    "norm_order": "post", "norm": "layer_norm", "norm_bias": True, "norm_eps": 1e-12, "type_vocab_size": 3,
    "position_embedding_type": "absolute", "hidden_act": "gelu", "gated": False, "attention_bias": True,
    "mlp_bias": True, "head_bias": True,
}  # fmt: skip
MODERN = {
    "norm": "layer_norm", "norm_eps": 1e-5, "hidden_act": "gelu", "local_attention": 6,
    "global_rope_theta": 900.0, "local_rope_theta": 40.0, "num_hidden_layers": 4,
}  # fmt: skip
LOCAL, FULL = "sliding_attention", "full_attention"
SHAPES = {
    "BERT": BERT,
    "BERT, one head, wide eps": BERT | {"num_attention_heads": 1, "norm_eps": 0.1, "num_hidden_layers": 1},
    "ModernBERT": MODERN,
    "ModernBERT, all biases, odd window": MODERN | {
        "norm_bias": True, "attention_bias": True, "mlp_bias": True, "head_bias": True, "local_attention": 5,
        "global_attn_every_n_layers": 2, "norm_eps": 0.1},
    "ModernBERT, local layers first": MODERN | {"layer_types": [LOCAL, FULL, LOCAL, LOCAL]},
}  # fmt: skip
OURS = SHAPES | {"defaults": {}, "defaults, windows": {"local_attention": 4, "num_hidden_layers": 3},
                 "post-norm, RMSNorm": BERT | {"norm": "rms_norm", "norm_bias": False}}  # fmt: skip
BERT_NAMES = [
    ("model.embed_tokens", "bert.embeddings.word_embeddings"),
    ("model.embed_positions", "bert.embeddings.position_embeddings"),
    ("model.embed_token_types", "bert.embeddings.token_type_embeddings"),
    ("model.embed_norm", "bert.embeddings.LayerNorm"), ("model.layers", "bert.encoder.layer"),
    ("self_attn.o_proj", "attention.output.dense"), ("self_attn.q_proj", "attention.self.query"),
    ("self_attn.k_proj", "attention.self.key"), ("self_attn.v_proj", "attention.self.value"),
    ("attention_norm", "attention.output.LayerNorm"), ("mlp.up_proj", "intermediate.dense"),
    ("mlp.down_proj", "output.dense"), ("mlp_norm", "output.LayerNorm"),
    ("head.dense", "cls.predictions.transform.dense"), ("head.norm", "cls.predictions.transform.LayerNorm"),
    ("lm_head", "cls.predictions.decoder"),
]  # fmt: skip
MODERN_NAMES = [
    ("embed_tokens", "embeddings.tok_embeddings"), ("embed_norm", "embeddings.norm"),
    ("attention_norm", "attn_norm"), ("self_attn.o_proj", "attn.Wo"), ("mlp.down_proj", "mlp.Wo"),
    ("model.norm", "model.final_norm"), ("lm_head", "decoder"),
]  # fmt: skip


def small(**changes) -> EncoderConfig:
    values = {"vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
              "intermediate_size": 20, "max_position_embeddings": 21}  # fmt: skip
    config = EncoderConfig(**values | changes)
    validate_section("encoder", config)
    return config


def model(name, dtype=torch.float64, kind=MaskedLM, **changes):
    return shake(kind(small(**OURS[name] | changes)), 1).to(dtype).eval()


def their_names(name, tensors) -> dict:
    """Our tensors (weights, or their gradients) under the names of transformers, joined as they are there."""
    modern, out, joined = name.startswith("Modern"), {}, {}
    for key, value in tensors.items():
        for old, new in MODERN_NAMES if modern else BERT_NAMES:
            key = key.replace(old, new)
        for parts, whole in (("qkv", "self_attn.{}_proj attn.Wqkv"), (("gate", "up"), "mlp.{}_proj mlp.Wi")):
            part, _, fused = whole.partition(" ")
            for one in parts:
                if modern and part.format(one) in key:
                    joined.setdefault(key.replace(part.format(one), fused), {})[one] = value
                    key = ""
        out |= {key: value} if key else {}
    order = ("q", "k", "v", "gate", "up")
    return out | {key: torch.cat([p[one] for one in order if one in p]) for key, p in joined.items()}


def twins(name, dtype):
    """Our model and Hugging Face's, loaded strictly."""
    config, modern = small(**SHAPES[name]), name.startswith("Modern")
    same = ("vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
            "max_position_embeddings")  # fmt: skip
    settings = {key: getattr(config, key) for key in same.split()} | {"attn_implementation": "eager"}
    if modern:
        same = ("norm_eps norm_bias attention_bias mlp_bias local_attention global_attn_every_n_layers "
                "layer_types")  # fmt: skip
        settings |= {key: getattr(config, key) for key in same.split()}
        thetas = {FULL: config.global_rope_theta, LOCAL: config.local_rope_theta}
        rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
        settings |= {"rope_parameters": rope, "classifier_bias": config.head_bias, "pad_token_id": 0}
        theirs = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**settings))
    else:
        settings |= {"layer_norm_eps": config.norm_eps, "type_vocab_size": config.type_vocab_size}
        theirs = transformers.BertForMaskedLM(transformers.BertConfig(**settings))
    ours = model(name, torch.float32)
    weights = their_names(name, ours.state_dict())
    if not modern:
        weights["cls.predictions.bias"] = weights["cls.predictions.decoder.bias"]
    theirs.load_state_dict(weights, strict=True)
    return ours.to(dtype), theirs.to(dtype).eval()


def layers_of(encoder) -> list:
    """The outputs of the embedding and of each layer, filled by the next forward."""
    body, seen = encoder.base_model if hasattr(encoder, "base_model") else encoder.model, []
    first = body.embeddings if hasattr(body, "embeddings") else body.embed_norm
    for one in [first, *(body.encoder.layer if hasattr(body, "encoder") else body.layers)]:
        one.register_forward_hook(lambda _, inputs, out: seen.append(out))
    return seen


def text(B, T, seed=0):
    return torch.randint(1, 53, (B, T), generator=torch.Generator().manual_seed(seed))


def mask(T, side):
    """Three rows: whole, with padding on a side, and with one real token."""
    length = torch.tensor([[T], [(T + 1) // 2], [1]])
    real = torch.arange(T)[None] < length
    return {"none": None, "right": real, "left": real.flip(1)}[side]


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("tokens", [1, 15])
@pytest.mark.parametrize("name", SHAPES)
def test_hidden_states_logits_and_every_gradient_are_hugging_faces(name, tokens, side):
    """BERT in fp64. Their ModernBERT rotates and takes the softmax in fp32, whose rounding is 6e-8: fp32
    then, with 1e-5 of the largest number of a tensor for sums of up to 45 tokens through 4 layers."""
    dtype, bound = (torch.float32, 1e-5) if name.startswith("Modern") else (torch.float64, 1e-12)
    ours, theirs = twins(name, dtype)
    ids, real = text(3, tokens), mask(tokens, side)
    typed = not name.startswith("Modern") and side != "none"  # by default every type is 0
    extra = {"token_type_ids": text(3, tokens, seed=1) % 3} if typed else {}
    real_tokens = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    labels = torch.where(real_tokens & (text(3, tokens, seed=2) % 3 > 0), ids, -100)
    labels[0, 0] = 7

    def close(one, other, what):
        gap = (one - other).abs().max()
        assert gap <= bound * max(1.0, other.abs().max()), f"{what}: {gap:.1e}"

    seen, expected = layers_of(ours), layers_of(theirs)
    logits = ours(ids, padding_mask=real, **extra).logits
    target = theirs(ids, attention_mask=None if real is None else real.long(), **extra).logits
    assert len(seen) == len(expected) == ours.config.num_hidden_layers + 1
    for number, (one, other) in enumerate(zip(seen, expected, strict=True)):
        close(one[real_tokens], other[real_tokens], f"hidden state {number}")
    close(logits[real_tokens], target[real_tokens], "logits")
    assert target.std() > 0.3

    out = ours(ids, labels, padding_mask=real, **extra)
    assert out.logits is None and len(out.nll) == (labels != -100).sum()
    nll = F.cross_entropy(target.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    close(out.nll, nll.detach()[labels.flatten() != -100], "nll")
    out.loss_sum.backward()
    nll.sum().backward()
    gradients = their_names(name, {key: parameter.grad for key, parameter in ours.named_parameters()})
    names = dict(theirs.named_parameters())
    if not name.startswith("Modern"):  # one parameter with two names
        gradients["cls.predictions.bias"] = gradients.pop("cls.predictions.decoder.bias")
    assert gradients.keys() == names.keys()
    for key, parameter in names.items():
        close(gradients[key], parameter.grad, key)


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_padding_never_changes_a_result(name):
    """Rows alone, and in a batch with padding on either side that holds any tokens. Absolute positions are
    column numbers, as in transformers: with padding on the left they are given."""
    ours = model(name).model
    whole, part = text(1, 13), text(1, 6, seed=1)
    noise = text(1, 7, seed=2)
    for ids, real in (
        (torch.cat([part, noise], dim=1), torch.arange(13) < 6),
        (torch.cat([noise, part], dim=1), torch.arange(13) > 6),
    ):
        masks = torch.stack([torch.ones(13, dtype=torch.bool), real])
        place = (masks.cumsum(1) - 1).clamp(min=0)
        hidden = ours(torch.cat([whole, ids]), padding_mask=masks, position_ids=place)
        torch.testing.assert_close(hidden[:1], ours(whole), rtol=0, atol=1e-12)
        torch.testing.assert_close(hidden[1:, real], ours(part), rtol=0, atol=1e-12)
        assert not hidden[1, ~real].any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash", "auto"])
@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "defaults"])
def test_a_row_of_padding_only_gives_zeros_and_leaves_the_gradients_alone(name, implementation):
    ours = model(name, attn_implementation=implementation)
    ids, real = text(2, 11), torch.ones(2, 11, dtype=torch.bool)
    real[1], labels = False, text(2, 11)
    labels[1], gradients = -100, []
    for rows in (slice(2), slice(1)):
        ours.zero_grad()
        out = ours(ids[rows], labels[rows], padding_mask=real[rows])
        (out.loss_sum + out.hidden.square().sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
        assert not out.hidden[1:].any()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_packed_documents_are_separate_rows(name):
    ours, texts = model(name).model, [text(1, length, seed=length) for length in (9, 1, 12, 5)]
    documents = torch.tensor([[3] * 9 + [0] * 1 + [1] * 12 + [2] * 5 + [-1] * 2])
    packed = torch.cat([*texts, text(1, 2)], dim=1)
    hidden = ours(packed, document_ids=documents, padding_mask=documents >= 0)
    expected = torch.cat([*(ours(one) for one in texts), torch.zeros(1, 2, 24)], dim=1)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_a_masked_position_never_sees_its_own_token(name):
    """The original token is in the labels alone: with another one there, its loss is read from the same
    scores, and nothing else changes."""
    ours, ids, labels = model(name), text(2, 9), torch.full((2, 9), -100)
    ids[0, 4], ids[1, 0] = 52, 52  # the mask token
    labels[0, 4], labels[1, 0] = 11, 12
    out, logits = ours(ids, labels), ours(ids).logits
    other = labels.clone()
    other[0, 4] = 30
    changed = ours(ids, other)
    assert torch.equal(out.hidden, changed.hidden) and torch.equal(out.nll[1], changed.nll[1])
    for nll, wanted in ((out.nll, [11, 12]), (changed.nll, [30, 12])):
        scores = logits[[0, 1], [4, 0]]
        torch.testing.assert_close(nll, F.cross_entropy(scores, torch.tensor(wanted), reduction="none"))
    ids[0, 3] = ids[0, 3] % 52 + 1  # while a neighbour is seen, in either direction
    assert not torch.isclose(ours(ids, labels).nll[0], out.nll[0])
    ids[0, 5] = ids[0, 5] % 52 + 1
    assert not torch.isclose(ours(ids, labels).hidden[0, 3], out.hidden[0, 3]).any()


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "defaults, windows"])
def test_all_paths_of_attention_agree(name):
    results = []
    for implementation in ("eager", "sdpa", "flash", "auto"):
        ours = checkpoint_layers(model(name, attn_implementation=implementation), implementation == "auto")
        out = ours(text(3, 14), text(3, 14, seed=1), padding_mask=mask(14, "left"))
        out.loss_sum.backward()
        results.append([out.hidden, *(parameter.grad for parameter in ours.parameters())])
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_no_label_at_all():
    ours = model("BERT")
    out = ours(text(1, 4), torch.full((1, 4), -100))
    out.loss_sum.backward()
    assert out.loss_sum == 0 and not len(out.nll)
    assert not any(parameter.grad.any() for parameter in ours.parameters())


def test_limits_in_numbers():
    bert = model("BERT")
    bert(text(1, 21))
    with pytest.raises(ValueError, match="22 tokens.*21 positions"):
        bert(text(1, 22))
    with pytest.raises(ValueError, match="31 tokens.*21 positions"):
        bert(text(1, 2), position_ids=torch.tensor([[0, 30]]))
    with pytest.raises(ValueError, match="token_type_ids.*type_vocab_size"):
        model("defaults")(text(1, 3), token_type_ids=text(1, 3))
    assert model("defaults")(text(1, 22)).logits.shape == (1, 22, 53)


@pytest.mark.parametrize("name", ["BERT", "defaults"])
def test_initial_weights(name):
    """Both bodies draw alike; the tied table is one parameter."""
    config = small(**OURS[name] | {"hidden_size": 96, "vocab_size": 500})
    for kind in (Encoder, MaskedLM):
        for key, parameter in kind(config).named_parameters():
            if parameter.dim() > 1:
                assert abs(parameter.std() / 0.02 - 1) < 6 / (2 * parameter.numel()) ** 0.5, key
            else:
                assert (parameter == (0 if key.endswith("bias") else 1)).all(), key
    ours = MaskedLM(config)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["BERT", "defaults"])
def test_under_autocast_the_residual_stream_stays_in_fp32(name):
    """A sum of layers in bf16 would lose what each adds. The bound is that of bf16 products, 8 bits."""
    ours = model(name, torch.float32)
    seen, exact = layers_of(ours), ours(text(2, 9)).hidden
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(text(2, 9), text(2, 9))
    assert all(hidden.dtype == torch.float32 for hidden in seen[1:]) and out.nll.dtype == torch.float32
    assert (out.hidden.float() - exact).norm() < 0.03 * exact.norm()
