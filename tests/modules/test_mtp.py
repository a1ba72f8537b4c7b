"""The heads against `MtpModel` of `transformers` and plain formulas; labels against a loop over places."""

import re

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DeepseekV3Config, DeepseekV3ForCausalLM, Dots1Config, Dots1ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)  # fmt: skip
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP, DeepseekV3RMSNorm

from inference.generation.speculative import draft
from model.caches import make_draft_cache
from model.tinyseek import TinySeek
from modules.attention.context import build_context
from modules.mtp import ParallelMTP, SequentialMTP, mtp_labels, next_ids
from tests.modules.tools import shake, small_config

MLA = {
    "attention_kind": "mla", "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "rope_interleaved": True,
}  # fmt: skip
MOE = {
    "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 10,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
TWINS = {"GQA": {}, "experts": MOE, "MLA": MLA, "MLA, experts": MLA | MOE}
KINDS = TWINS | {
    "window": {"sliding_window": 4},
    "window, sinks": {"sliding_window": 3, "attention_sinks": 2},
    "pattern": {"sliding_window": 4, "sliding_window_pattern": 2},
}


def build(kind="sequential", dtype=torch.float64, seed=1, **changes) -> TinySeek:
    changes = {"tie_word_embeddings": False} | changes
    return shake(TinySeek(small_config(mtp=kind, **changes)), seed).to(dtype).eval()


def their_name(name):
    """Of a weight of our head."""
    return re.sub("^norm", "post_norm", name.removeprefix("mtp.")).replace("layer.", "mtp_block.", 1)


def their_twin(model: TinySeek):
    """The model and its head in `transformers`, with the same weights."""
    c = model.config
    config = {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "intermediate_size": c.intermediate_size,
        "num_key_value_heads": c.num_attention_heads, "rms_norm_eps": c.rms_norm_eps, "head_dim": c.head_dim,
        "rope_theta": c.rope_theta, "tie_word_embeddings": False, "num_mtp_layers": 1,
        "mtp_layer_types": ["full_attention"], "attn_implementation": "eager",
        "experts_implementation": "eager", "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    experts = {name: getattr(c, name) for name in (*MOE, "n_group", "topk_group", "norm_topk_prob")}
    if c.attention_kind == "mla":
        del config["head_dim"], config["mtp_layer_types"]
        config |= {name: getattr(c, name) for name in MLA if name.endswith(("_rank", "_dim"))}
        config |= {"rope_interleave": True, "num_nextn_predict_layers": 1}
        if c.n_routed_experts:
            config |= experts
        else:
            config |= {"n_routed_experts": 2, "n_shared_experts": 1, "moe_intermediate_size": 2}
            config |= {"first_k_dense_replace": c.num_hidden_layers, "num_experts_per_tok": 1}
            config |= {"n_group": 1, "topk_group": 1}
        theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    else:
        config |= {"num_key_value_heads": c.num_key_value_heads}
        if c.n_routed_experts:
            theirs = Dots1ForCausalLM(Dots1Config(**config, **experts, sliding_window=None))
        else:
            theirs = Qwen3ForCausalLM(Qwen3Config(**config))
    head = MtpModel(theirs, 1)
    if c.attention_kind == "mla" and not c.n_routed_experts:  # there the extra layer always has experts
        head.layers[0].mtp_block.mlp = DeepseekV3MLP(theirs.config)
    ours = model.state_dict()
    head.layers[0].load_state_dict({their_name(n): v for n, v in ours.items() if n.startswith("mtp.")})
    theirs.load_state_dict({name: value for name, value in ours.items() if not name.startswith("mtp.")})
    return theirs.double().eval(), head.double().eval()


@pytest.mark.parametrize("name", TWINS)
def test_the_block_is_that_of_transformers(name):
    """Hidden states, logits, drafts; the trunk's hidden state goes in as theirs does, after its last norm.
    Then the gradient that reaches every parameter of the trunk and of the head, through the head alone."""
    model = build(**TWINS[name])
    theirs, head = their_twin(model)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    output = theirs(ids, output_hidden_states=True)
    positions = torch.arange(1, 10)[None]
    second = head.forward_layer(
        0, output.hidden_states[-1], positions, MtpCache(config=head.config), input_ids=next_ids(ids)
    )
    logits = head._project_to_logits(second)
    ours = model(ids)
    our_logits, our_second = draft(model, ours.hidden, next_ids(ids))
    for a, b in ((ours.hidden, output.hidden_states[-1]), (our_second, second), (our_logits, logits)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    drafts, _, _ = head(
        next_ids(ids), output.hidden_states[-1], None, positions, MtpCache(config=head.config)
    )
    assert torch.equal(drafts[:, 0], our_logits[:, -1].argmax(dim=1))

    upstream = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (logits * upstream).sum().backward()
    (our_logits * upstream).sum().backward()
    expected = dict(theirs.named_parameters())
    expected |= {"mtp." + name: parameter for name, parameter in head.layers[0].named_parameters()}
    for name, parameter in model.named_parameters():
        twin = expected["mtp." + their_name(name) if name.startswith("mtp.") else name]
        assert twin.grad.any(), name
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-5, atol=1e-5 * twin.grad.abs().max())


def test_the_sequential_head_around_any_layer():
    """With parts of DeepSeek-V3 in `transformers` put together as the released model has them: the embedding
    first. The layer gets what it was given, and its routing comes back."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(24, 24)

        def forward(self, hidden, context, rotary, cache):
            self.seen = (context, rotary, cache)
            return hidden + self.linear(hidden).tanh(), "routing"

    config = small_config(rms_norm_eps=1e-3)
    ours = shake(SequentialMTP(config, Layer()))
    enorm, hnorm, norm = (DeepseekV3RMSNorm(24, eps=1e-3) for _ in range(3))
    for theirs, mine in ((enorm, ours.enorm), (hnorm, ours.hnorm), (norm, ours.norm)):
        theirs.load_state_dict(mine.state_dict())
    torch.manual_seed(0)
    hidden, embeddings, upstream = torch.randn(3, 2, 5, 24)
    results = []
    for way in ("ours", "theirs"):
        inputs = [hidden.clone().requires_grad_(), embeddings.clone().requires_grad_()]
        if way == "ours":
            second, routing = ours(*inputs, "context", "rotary", "cache")
            assert routing == "routing" and ours.layer.seen == ("context", "rotary", "cache")
        else:
            both = torch.cat([enorm(inputs[1]), hnorm(inputs[0])], dim=-1)
            mixed = F.linear(both, ours.eh_proj.weight)
            second = norm(mixed + torch.tanh(ours.layer.linear(mixed)))
        gradients = torch.autograd.grad((second * upstream).sum(), [*inputs, ours.eh_proj.weight])
        results.append([second, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_parallel_head_is_its_formula():
    config = small_config(rms_norm_eps=1e-3)
    head = shake(ParallelMTP(config)).double()
    torch.manual_seed(0)
    hidden, upstream = torch.randn(2, 2, 5, 24, dtype=torch.float64)
    hidden.requires_grad_()
    weight, gain = head.proj.weight, head.norm.weight
    moved = hidden + (hidden @ weight.T) / (1 + torch.exp(-hidden @ weight.T))
    slow = moved / torch.sqrt((moved**2).sum(dim=-1, keepdim=True) / 24 + 1e-3) * gain
    torch.testing.assert_close(head(hidden)[0], slow, rtol=0, atol=1e-13)
    inputs = (hidden, weight, gain)
    ours = torch.autograd.grad((head(hidden)[0] * upstream).sum(), inputs)
    for a, b in zip(ours, torch.autograd.grad((slow * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def slow_triples(text, supervised, documents=None):
    """By the definition: (token whose hidden state is read, embedded token, label) of each place that counts.

    `text` has one token more than the row; supervised[t] says whether token t may be a label.
    """
    triples = {}
    for t in range(len(text) - 1):
        if t + 2 > len(text) - 1 or not supervised[t + 2]:
            continue
        if documents is not None and documents[t + 1] != documents[t]:
            continue
        triples[t] = (text[t], text[t + 1], text[t + 2])
    return triples


@pytest.mark.parametrize("length", [1, 2, 3, 12])
@pytest.mark.parametrize("packed", [False, True])
def test_hidden_embedding_and_label_belong_together(length, packed):
    generator = torch.Generator().manual_seed(length)
    text = torch.randint(1, 1000, (3, length + 1), generator=generator)
    supervised = torch.rand(3, length + 1, generator=generator) < 0.7
    documents = (torch.rand(3, length, generator=generator) < 0.4).long().cumsum(dim=1) if packed else None
    ids, labels = text[:, :-1], text[:, 1:].masked_fill(~supervised[:, 1:], -100)
    following, second = next_ids(ids), mtp_labels(labels, documents)
    assert following.shape == second.shape == ids.shape and following.dtype == second.dtype == torch.long
    for b in range(3):
        expected = slow_triples(
            text[b].tolist(), supervised[b].tolist(), documents[b].tolist() if packed else None
        )
        found = {
            t: (ids[b, t].item(), following[b, t].item(), second[b, t].item())
            for t in range(length)
            if second[b, t] != -100
        }
        assert found == expected
    if length == 12:
        assert (second != -100).sum() > 3 and (second[:, :-1] == -100).any()


def test_the_example_of_the_docstring():
    words = {word: n for n, word in enumerate(["0", "the", "cat", "sat", "down", "."])}
    text = torch.tensor([[words[word] for word in ("the", "cat", "sat", "down", ".")]])
    assert next_ids(text[:, :-1]).tolist() == [[words[word] for word in ("cat", "sat", "down", "0")]]
    assert mtp_labels(text[:, 1:]).tolist() == [[words["sat"], words["down"], words["."], -100]]


def test_labels_are_new_tensors():
    """Neither the labels of the first head nor the input may change."""
    labels, ids = torch.arange(6).view(1, 6), torch.arange(6).view(1, 6)
    mtp_labels(labels, torch.tensor([[0, 0, 0, 1, 1, 1]])), next_ids(ids)
    assert labels.tolist() == ids.tolist() == [[0, 1, 2, 3, 4, 5]]


def head_loss(model, ids, labels, documents=None):
    """Cross-entropy of the second head, summed, from full logits. Also the gradient of every parameter."""
    decoded = model.model(ids, document_ids=documents)
    following = model.model.embed_tokens(next_ids(ids))
    second, _ = model.mtp(decoded.hidden, following, decoded.context, decoded.rotary)
    wanted = mtp_labels(labels, documents)
    loss = F.cross_entropy(model.lm_head(second).flatten(0, 1), wanted.flatten(), reduction="sum")
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def test_packed_documents_give_the_loss_of_each_alone():
    """The last token of a document embeds the next document's first: it must neither count nor be seen."""
    model = build()
    lengths = (5, 1, 7, 2)
    text = torch.randint(1, 61, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(length)]])
    pieces = text.split(lengths, dim=1)
    labels = torch.cat([F.pad(piece[:, 1:], (0, 1), value=-100) for piece in pieces], dim=1)
    loss, gradients = head_loss(model, text, labels, documents)
    alone = [head_loss(model, piece, F.pad(piece[:, 1:], (0, 1), value=-100)) for piece in pieces]
    torch.testing.assert_close(loss, sum(one for one, _ in alone), rtol=1e-12, atol=0)
    for n, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(g[n] for _, g in alone), rtol=0, atol=1e-11)


def test_what_stands_in_for_the_next_token_never_counts(monkeypatch):
    """Another id in the last column changes neither loss nor gradient."""
    model = build()
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    loss, gradients = head_loss(model, ids, labels)
    monkeypatch.setattr(
        f"{__name__}.next_ids", lambda ids: torch.cat([ids[:, 1:], torch.full((2, 1), 33)], dim=1)
    )
    other, others = head_loss(model, ids, labels)
    assert torch.equal(loss, other)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@torch.no_grad()
def test_in_pieces_with_a_cache_as_in_one_forward(name, dtype, atol):
    """Teacher-forced hidden states of a whole row, and the same drafted in pieces of 7, 1, 3, 1, 2 columns,
    with a wrong guess in between that is forgotten again."""
    model = build(dtype=dtype, **KINDS[name])
    ids = torch.randint(0, 61, (1, 14), generator=torch.Generator().manual_seed(4))
    hidden, following = model(ids).hidden, next_ids(ids)
    window = None if name == "pattern" else model.config.sliding_window  # its MTP layer sees all
    context = build_context(14, "cpu", window=window, sinks=model.config.attention_sinks)
    expected, ours = context.bias(dtype), model.model(ids).context.bias(dtype)  # as in training
    assert torch.equal(ours, expected) if expected is not None else ours is None
    rotary = model.model.rotary_emb(context.positions)
    whole, _ = model.mtp(hidden, model.model.embed_tokens(following), context, rotary)
    cache, start = make_draft_cache(model, 1, 20), 0
    for columns in (7, 1, 3, 1, 2):
        end = start + columns
        logits, second = draft(model, hidden[:, start:end], following[:, start:end], cache)
        torch.testing.assert_close(second, whole[:, start:end], rtol=0, atol=atol)
        torch.testing.assert_close(logits, model.lm_head(whole[:, start:end]), rtol=0, atol=10 * atol)
        draft(model, second[:, -1:], torch.tensor([[7]]), cache)
        cache.crop([end])
        start = end
