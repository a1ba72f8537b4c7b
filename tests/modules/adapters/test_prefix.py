"""Prefix and prompt against `peft` around Hugging Face's model, against the same model that reads real text,
and each packed document against itself alone."""

import copy
from unittest import mock

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from config.adapters import PrefixConfig
from inference.generation.speculative import draft
from model.caches import make_cache, make_draft_cache
from inference.fast.decoder import refusal
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.tinyseek import TinySeek
from modules.attention.context import build_context
from modules.adapters.prefix import PrefixEncoder, add_prefix
from tests.model.test_tinyseek import text, twins
from tests.modules.tools import added, shake, small_config
from utils.errors import UserError

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 10}
SHAPES = {  # settings, n, T
    "tied": ({}, 5, 7),
    "one place, one token": ({}, 1, 1),
    "MHA, more places than tokens": ({"num_key_value_heads": 4, "num_hidden_layers": 3}, 9, 4),
    "MQA, bias, untied": (
        {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False}, 3, 6,
    ),
    "eager, one layer": ({"attn_implementation": "eager", "num_hidden_layers": 1}, 4, 5),
}  # fmt: skip


def random_prefix(model, n, seed=0):
    """Replaces any prefix by a random one: keys of the size of normal ones, so that they are attended to."""
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, n, config.head_dim)
    keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model.prefix = PrefixEncoder(keys.to(model.lm_head.weight), values.to(model.lm_head.weight))
    return model


def prefixed(n=4, **changes):
    """A random model in fp64 with a random prefix."""
    return random_prefix(shake(TinySeek(small_config(**changes))).double().eval(), n)


def add_as(ids, model, config):
    """Add a prefix or a prompt that starts as the text `ids`, in place of random tokens; return the names."""
    with mock.patch("torch.randint", return_value=ids):
        return added(add_prefix, model, config)


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_a_prefix_is_pefts(name):
    """Logits, and the gradient of every key and value."""
    changes, n, tokens = SHAPES[name]
    ours, theirs = twins(**changes)
    config = ours.config
    layers, groups, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    settings = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=n, num_attention_heads=config.num_attention_heads,
        token_dim=config.num_attention_heads * dim,
    )  # fmt: skip
    theirs = get_peft_model(theirs, settings).eval()
    table = theirs.prompt_encoder["default"].embedding.weight  # (n, L*2*G*D)
    random_prefix(ours, n)
    with torch.no_grad():
        stacked = torch.stack([ours.prefix.keys, ours.prefix.values], dim=1)  # (L, 2, G, n, D)
        table.copy_(stacked.permute(3, 0, 1, 2, 4).reshape(n, -1))
    ids = text(2, tokens)
    expected = theirs(ids).logits
    logits = ours(ids).logits
    assert (logits - twins(**changes)[0](ids).logits).abs().max() > 0.1  # the prefix matters
    same(logits, expected, 1e-5)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(expected, table, upstream)
    grad = grad.view(n, layers, 2, groups, dim).permute(1, 2, 3, 0, 4)
    keys, values = torch.autograd.grad(logits, tuple(ours.prefix.parameters()), upstream)
    for got, twin in ((keys, grad[:, 0]), (values, grad[:, 1])):
        assert twin.abs().max() > 1e-3
        assert (got - twin).abs().max() < 1e-5 * twin.abs().max()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=str)
def test_prompt_tokens_in_front_are_pefts(changes):
    """`peft` puts its learned embeddings before the row; here they are ids in the row."""
    ours, theirs = twins(**changes)
    theirs.requires_grad_(False)
    theirs = get_peft_model(theirs, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    add_prefix(ours, PrefixConfig(kind="prompt", length=2))
    prompt = ours.model.embed_tokens.prompt
    shake(ours.model.embed_tokens, seed=3)
    ours.model.embed_tokens.weight.data.copy_(theirs.get_input_embeddings().weight)
    table = theirs.prompt_encoder["default"].embedding.weight
    table.data.copy_(prompt.data)
    ids = text(2, 5)
    logits = ours(torch.cat([torch.arange(61, 67).expand(2, -1), ids], dim=1)).logits
    expected = theirs(ids).logits
    same(logits, expected, 1e-5)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (twin,) = torch.autograd.grad(expected, table, upstream)
    (got,) = torch.autograd.grad(logits, prompt, upstream)
    assert twin.abs().max() > 1e-3
    assert (got - twin).abs().max() < 1e-5 * twin.abs().max()


def packed():
    """Two rows: documents of 3, 1 and 4 tokens; of 5 and 2 tokens and one of padding."""
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2], [7, 7, 7, 7, 7, 4, 4, 4]])
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 0]])
    padding = torch.ones(2, 8, dtype=torch.long)
    padding[1, 7] = 0
    parts = [(0, slice(0, 3)), (0, slice(3, 4)), (0, slice(4, 8)), (1, slice(0, 5)), (1, slice(5, 7))]
    return {"document_ids": documents, "position_ids": positions, "padding_mask": padding}, parts


@pytest.mark.parametrize("changes", [{}, {"attn_implementation": "eager"}, MOE], ids=str)
def test_every_packed_document_is_the_document_alone_with_the_prefix(changes):
    """Logits, and the gradient of the prefix, in fp64."""
    model, (about, parts), ids = prefixed(**changes), packed(), text(2, 8)
    logits = model(ids, **about).logits
    weights = torch.randn(61, dtype=torch.float64)
    alone = [model(ids[row : row + 1, part]).logits[0] for row, part in parts]
    together = [logits[row, part] for row, part in parts]
    for got, expected in zip(together, alone, strict=True):
        same(got, expected)
    grads = [
        torch.autograd.grad(sum((one @ weights).sum() for one in some), tuple(model.prefix.parameters()))
        for some in (together, alone)
    ]
    for got, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 1e-3
        same(got, expected)


@pytest.mark.parametrize("changes", [{"dropout": 0.3}, MOE, {"rope_interleaved": True}], ids=str)
def test_it_starts_as_the_text_it_was_taken_from(changes):
    """With a prefix made of n tokens, and with a prompt made of them, a text's logits are those that follow
    these tokens; what a role's marker is followed by is the same in the middle."""
    model, front = shake(TinySeek(small_config(**changes))).double(), text(1, 6, seed=4)
    ids = text(2, 5)
    whole = torch.cat([front.expand(2, -1), ids], dim=1)
    expected = model.eval()(whole).logits
    model.train()
    prompted = copy.deepcopy(model)
    assert add_as(front[0], model, PrefixConfig(length=6)) == ["prefix.keys", "prefix.values"]
    assert model.training and model.model.layers[0].mlp.training and model.prefix_length == 6
    model.eval(), prompted.eval()
    same(model(ids).logits, expected[:, 6:])
    assert add_as(front[0], prompted, PrefixConfig("prompt", 2)) == ["model.embed_tokens.prompt"]
    assert prompted.prefix_length == 0
    for place in (0, 3):
        ours = whole.clone()
        ours[:, place : place + 3] = front[0, place : place + 3].new_tensor([61, 62, 63]) + place
        assert (ours >= 61).sum() == 6
        same(prompted(ours).logits, expected)
    with pytest.raises(IndexError):
        prompted(torch.tensor([[67]]))


def test_the_start_is_random_tokens():
    table = shake(TinySeek(small_config())).model.embed_tokens.weight

    def start(length):
        model = shake(TinySeek(small_config()))
        add_prefix(model, PrefixConfig("prompt", length))
        return model.model.embed_tokens.prompt

    torch.manual_seed(0)
    first, second = start(20), start(20)
    torch.manual_seed(0)
    assert torch.equal(start(20), first) and not torch.equal(first, second)
    rows = {tuple(row.tolist()) for row in table}
    assert all(tuple(row.tolist()) in rows for row in first) and len(set(map(tuple, first.tolist()))) > 10


@torch.no_grad()
def greedy(model, prompt, new):
    """The obvious loop: the whole text again for every token."""
    row = list(prompt)
    for _ in range(new):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, MOE, {"num_key_value_heads": 1}], ids=str)
def test_generation_with_a_cache_is_generation_without(changes):
    """Rows of different lengths, token for token, through a cache that starts with the prefix; the fast
    decoder, which knows no prefix, leaves a single row to the plain path."""
    model = prefixed(n=5, **changes)
    assert refusal(model)
    prompts = [text(1, size, seed=size)[0].tolist() for size in (1, 4, 9)]
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    model.prefix, prefix = None, model.prefix
    assert [greedy(model, prompt, 8) for prompt in prompts] != expected
    model.prefix = prefix
    params = SamplingParams(temperature=0, max_new_tokens=8)
    assert Generator(model).generate(prompts, params) == expected
    assert Generator(model).generate(prompts[1:2], params) == expected[1:2]


@torch.no_grad()
def test_logits_piece_by_piece_are_those_of_the_whole():
    """Pieces of a text through a cache, also with places given, and after a crop."""
    model, ids = prefixed(n=3), text(2, 9)
    expected = model(ids).logits
    with torch.enable_grad():
        cache = make_cache(model, 2, 9)
    assert cache.lengths == [3, 3] and cache.capacity == 12 and not cache.store.requires_grad
    positions = torch.arange(9).expand(2, -1)
    got = [
        model(piece, cache=cache, position_ids=places).logits
        for piece, places in zip(ids.split([4, 1, 4], 1), positions.split([4, 1, 4], 1), strict=True)
    ]
    same(torch.cat(got, dim=1), expected)
    cache.crop([3 + 5, 3 + 5])
    same(model(ids[:, 5:], cache=cache).logits, expected[:, 5:])


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_the_second_head_has_no_prefix(kind, tokens):
    """Its attention sees the text alone, as its own cache does when it drafts."""
    model, ids = prefixed(mtp=kind, tie_word_embeddings=False), text(2, tokens)
    labels = text(2, tokens, seed=5)
    out = model(ids, labels=labels, mtp=True)
    cache = make_draft_cache(model, 2, 9)
    logits, _ = draft(model, out.hidden, torch.cat([ids[:, 1:], ids.new_zeros(2, 1)], 1), cache)
    supervised = labels[:, 1:]
    nll = -logits[:, :-1].log_softmax(-1).gather(2, supervised[..., None]) if tokens > 1 else torch.zeros(1)
    same(out.mtp_loss_sum.detach(), nll.sum().detach().to(out.mtp_loss_sum))
    if tokens > 1:
        out.mtp_loss_sum.backward()
        assert model.prefix.keys.grad.abs().max() > 1e-6  # through the trunk


def test_every_query_sees_the_prefix_whatever_else_it_may_see():
    """Two tokens, the second alone in its window; and encoders, where everyone sees everyone."""
    mask = build_context(2, "cpu", window=1, prefix=3).mask
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    context = build_context(2, "cpu", causal=False, prefix=3)
    assert context.mask is None and not context.is_causal and context.positions.tolist() == [[3, 4]]


def test_routing_is_that_of_the_real_tokens_only():
    """With a prefix made of real text: the experts, weights and logits of the tokens behind it are those that
    a plain model gives them behind that text, and no row belongs to the prefix."""
    model = shake(TinySeek(small_config(**MOE))).double().eval()
    ids = text(1, 9)
    expected = model(ids).routings
    add_as(ids[0, :4], model, PrefixConfig("prefix", 4))
    routings = model(ids[:, 4:]).routings
    assert len(routings) == len(expected) == 2
    for routing, whole in zip(routings, expected, strict=True):
        assert torch.equal(routing.indices, whole.indices[4:])
        same(routing.weights, whole.weights[4:])
        same(routing.logits, whole.logits[4:])


def test_under_autocast_the_prefix_follows_the_tokens():
    model = random_prefix(shake(TinySeek(small_config())), 4)
    exact = model(text(2, 6)).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(text(2, 6)).logits
    tokens = torch.randn(2, 2, 3, 8, dtype=torch.bfloat16)
    assert {part.dtype for part in model.prefix.append(0, tokens, tokens)} == {torch.bfloat16}
    assert (logits - exact).norm() < 0.03 * exact.norm()
    logits.float().sum().backward()
    assert model.prefix.keys.grad.dtype == torch.float32
    half = copy.deepcopy(model).bfloat16()
    assert make_cache(half, 1, 3).store.dtype == torch.bfloat16
    assert (half(text(2, 6)).logits - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_the_new_parameters_are_named_and_saved(kind):
    model = shake(TinySeek(small_config()))
    before = dict(model.named_parameters())
    names = added(add_prefix, model, PrefixConfig(kind, 3))
    after = dict(model.named_parameters())
    assert set(after) == set(before) | set(names) and all(after[name] is before[name] for name in before)
    assert set(names) <= set(model.state_dict())
    for name in names:  # memory of its own, as large as it needs
        assert after[name].is_contiguous() and after[name].untyped_storage().size() == 4 * after[name].numel()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    other = TinySeek(small_config())
    add_prefix(other, PrefixConfig(kind, 3))
    other.load_state_dict(model.state_dict(), strict=True)
    ids = text(2, 5) if kind == "prefix" else torch.arange(56, 66).view(2, 5)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert torch.equal(twin(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "changes, length, words",
    [
        ({"attention_kind": "mla"}, 4, "attention_kind=mla.*prefix.kind=prompt"),
        ({"sliding_window": 5}, 4, "sliding_window.*prefix.kind=prompt"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 7, "local_size": 2}},
            4, "dual_chunk_attention_config.*prefix.kind=prompt",
        ),
        ({}, 64, "prefix.length=64.*64: lower it"),
    ],
)
def test_what_cannot_have_a_prefix_says_so(changes, length, words):
    model = TinySeek(small_config(**changes))
    with pytest.raises(UserError, match=words):
        add_prefix(model, PrefixConfig("prefix", length))
    assert model.prefix is None
    add_prefix(model, PrefixConfig("prompt", length))  # always possible
    assert model(torch.tensor([[61, 5]])).logits.isfinite().all()
