"""The encoder-decoder against Hugging Face's T5, with random weights and gains."""

from functools import partial

import pytest
import torch
from torch import nn

from config.checks import validate_section
from config.seq2seq import Seq2SeqConfig
from model.encoder_decoder import EncoderDecoder
from modules.checkpointing import checkpoint_layers
from tests.modules.tools import shake

SHAPES = {
    "usual": {},
    "tied and scaled, T5": {"scale_decoder_outputs": True},
    "untied, T5 v1.1": {"tie_word_embeddings": False},
    "one head, one layer to read": {"num_attention_heads": 1, "num_hidden_layers": 1},
    "three layers to write, few buckets": {"num_decoder_layers": 3, "relative_attention_num_buckets": 8,
                                           "relative_attention_max_distance": 9},
    "odd sizes": {"hidden_size": 21, "num_attention_heads": 3, "head_dim": 5, "intermediate_size": 13},
}  # fmt: skip
LENGTHS = {"usual": (9, 6), "one token each": (1, 1), "longer than the buckets": (150, 140)}


def build(dtype=torch.float64, **changes):
    values = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 6,
              "intermediate_size": 40, "max_position_embeddings": 40}  # fmt: skip
    config = Seq2SeqConfig(**(values | changes))
    validate_section("seq2seq", config)
    model = shake(EncoderDecoder(config), seed=1, scale=0.2).to(dtype).eval()
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.relative_bias.weight *= 5  # as large as the scores
    return model


def their_name(name):
    """The name in `T5ForConditionalGeneration`: each block is a list of two or three."""
    parts = name.split(".")
    if parts[0] in ("embed_tokens", "lm_head"):
        return name.replace("embed_tokens", "shared")
    stack, last = parts[0], parts[0] == "decoder"
    if parts[1] == "relative_bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if parts[1] == "norm":
        return f"{stack}.final_layer_norm.weight"
    place = {"self_attn": 0, "attention": 0, "cross_attn": 1, "cross": 1, "mlp": 1 + last}
    block = f"{stack}.block.{parts[2]}.layer.{place[parts[3].removesuffix('_norm')]}"
    if parts[3].endswith("_norm"):
        return f"{block}.layer_norm.weight"
    inner = {"self_attn": "SelfAttention", "cross_attn": "EncDecAttention", "mlp": "DenseReluDense"}[parts[3]]
    mlp = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
    return f"{block}.{inner}.{mlp.get(parts[4], parts[4][0])}.weight"


def twin(model):
    """Hugging Face's model with the same weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    c = model.config
    theirs = T5ForConditionalGeneration(T5Config(
        vocab_size=c.vocab_size, d_model=c.hidden_size, d_kv=c.head_dim, d_ff=c.intermediate_size,
        num_layers=c.num_hidden_layers, num_decoder_layers=c.num_decoder_layers,
        num_heads=c.num_attention_heads, feed_forward_proj="gated-gelu", layer_norm_epsilon=c.rms_norm_eps,
        relative_attention_num_buckets=c.relative_attention_num_buckets,
        relative_attention_max_distance=c.relative_attention_max_distance,
        decoder_start_token_id=c.decoder_start_token_id, dropout_rate=c.dropout,
        tie_word_embeddings=c.scale_decoder_outputs,
    ))  # fmt: skip
    if not c.tie_word_embeddings:  # the settings above have no way to say so
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    dtype = model.embed_tokens.weight.dtype
    theirs = theirs.to(dtype).eval()
    for part in theirs.modules():
        if type(part).__name__ == "T5LayerNorm" and dtype == torch.float64:  # takes its mean in fp32 always
            part.forward = partial(nn.functional.rms_norm, normalized_shape=part.weight.shape,
                                   weight=part.weight, eps=part.variance_epsilon)  # fmt: skip
    names = {their_name(name): p for name, p in model.named_parameters()}
    assert set(names) == {name for name, _ in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(names[name])
    return theirs


def batch(source, target, pad, seed=0):
    """Four rows of random ids, masks and labels; with `pad`, some tokens of each row are padding."""
    draw = torch.Generator().manual_seed(seed)
    ids, written = (torch.randint(1, 61, (4, n), generator=draw) for n in (source, target))
    labels = torch.randint(1, 61, (4, target), generator=draw)
    masks = [torch.ones(4, n, dtype=torch.bool) for n in (source, target)]
    if pad:
        for mask in masks:
            n = mask.shape[1]
            mask[1, : n // 2] = False  # on the left
            mask[2, n - n // 3 :] = False  # on the right
        labels[~masks[1]] = -100
    return ids, written, labels, *masks


def close(ours, theirs, bound):
    """Compare with the size of the numbers, which must not be all zero."""
    size = theirs.abs().max()
    assert size > 0 and (ours - theirs).abs().max() < bound * size, (ours - theirs).abs().max() / size


def watch(parts):
    """A list that fills with the output of each of these parts."""
    states = []

    def note(part, inputs, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    for part in parts:
        part.register_forward_hook(note)
    return states


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_states_logits_gradients_of_transformers(shape, lengths, dtype=torch.float64, bound=1e-10):
    model, pad = build(dtype, **shape), lengths != (1, 1)
    theirs, (ids, written, labels, mask, target_mask) = twin(model), batch(*lengths, pad)
    stacks = [model.encoder, model.decoder]
    ours = watch([part for stack in stacks for part in (*stack.layers, stack.norm)])
    stacks = [theirs.encoder, theirs.decoder]
    wanted = watch([part for stack in stacks for part in (*stack.block, stack.final_layer_norm)])
    masks = {"padding_mask": mask, "decoder_padding_mask": target_mask} if pad else {}
    output = model(ids, labels, decoder_input_ids=written, **masks)
    expected = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=written,
                      decoder_attention_mask=target_mask, labels=labels)  # fmt: skip
    for number, (mine, other) in enumerate(zip(ours, wanted, strict=True)):
        real = mask if number <= model.config.num_hidden_layers else target_mask
        close(mine[real], other[real], bound)
    close(model.logits(output.hidden)[target_mask], expected.logits[target_mask], bound)
    count = (labels != -100).sum()
    close(output.loss_sum / count, expected.loss, bound)
    assert len(output.nll) == count
    output.loss_sum.backward()
    (expected.loss * count).backward()
    gradients = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        other = gradients[their_name(name)].grad
        if not pad and any(part in name for part in ("q_proj", "k_proj", "relative_bias", "cross_norm")):
            rounding = 100 * torch.finfo(p.dtype).eps  # one key has weight 1, whatever its score
            assert max(p.grad.abs().max(), other.abs().max()) < rounding
        else:
            close(p.grad, other, bound)


def test_the_same_in_fp32():
    shape = SHAPES["tied and scaled, T5"]
    test_states_logits_gradients_of_transformers(shape, LENGTHS["usual"], torch.float32, 1e-5)


def test_padding_changes_nothing():
    model, (ids, written, *_) = build(), batch(5, 4, False)
    plain = model(ids, decoder_input_ids=written).logits
    for left, right in ((3, 0), (0, 2), (1, 4)):
        longer = [nn.functional.pad(x, (left, right), value=7) for x in (ids, written)]
        masks = [nn.functional.pad(torch.ones_like(x), (left, right)) for x in (ids, written)]
        padded = model(longer[0], padding_mask=masks[0], decoder_input_ids=longer[1],
                       decoder_padding_mask=masks[1]).logits  # fmt: skip
        torch.testing.assert_close(padded[:, left : left + 4], plain, rtol=0, atol=1e-12)


def test_an_empty_source_is_no_source():
    """Hugging Face's decoder without an encoder has no cross attention: the same as reading zeros."""
    model, (ids, written, labels, mask, _) = build(), batch(5, 4, False)
    theirs = twin(model)
    mask[1:] = False
    output = model(ids, padding_mask=mask, decoder_input_ids=written)
    alone = theirs.decoder(input_ids=written).last_hidden_state
    close(output.hidden[1:], alone[1:], 1e-10)
    assert (output.hidden[0] - alone[0]).abs().max() > 0.01
    assert not model.encode(ids, mask)[1:].any()
    labels[0] = -100  # only rows without a source count
    model(ids, labels, padding_mask=mask, decoder_input_ids=written).loss_sum.backward()
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        blind = name.startswith("encoder.") or "cross" in name
        assert p.grad.isfinite().all() and bool(p.grad.any()) != blind, name


def test_dropout_is_where_t5_has_it():
    """The same random numbers, drawn in the same order, drop the same values."""
    model, (ids, written, *_) = build(dropout=0.3).train(), batch(7, 5, False)
    theirs = twin(model).train()
    theirs.set_attn_implementation("eager")
    results = []
    for each in (model, theirs):
        torch.manual_seed(3)
        results.append(each(input_ids=ids, decoder_input_ids=written).logits)
    close(*results, 1e-10)


def test_gradient_checkpointing_and_dropout():
    """Layers that are computed again drop the same values again."""
    model = build(dropout=0.3).train()
    ids, written, labels, *masks = batch(7, 5, True)

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(ids, labels, padding_mask=masks[0], decoder_input_ids=written).loss_sum.backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    checkpoint_layers(model)
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_it_learns_from_its_own_start():
    """To write a row backwards: without the source, 11 equally likely tokens cost log(11) = 2.4."""
    torch.manual_seed(0)
    model = EncoderDecoder(build(vocab_size=12).config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        ids = torch.randint(1, 12, (32, 3))
        written = nn.functional.pad(ids.flip(1)[:, :-1], (1, 0))
        output = model(ids, ids.flip(1), decoder_input_ids=written)
        optimizer.zero_grad()
        (output.loss_sum / output.nll.numel()).backward()
        optimizer.step()
    assert output.nll.mean() < 1.2
