"""Decode one row on a CPU, a few tokens at a time: what `TinySeek.forward` computes, four times as fast.

A small model spends most of a decoding step not on arithmetic but on overhead: every PyTorch call costs about
a microsecond, every module, autograd function and new tensor some more. With experts (4 of 16, hidden size
256, 4 layers, fp32, one thread) the plain path makes 600 calls a token and takes 3.0 ms; this one makes 150,
most of them into preallocated memory, and takes 0.7 ms. The largest gains are matrices stored (in, out),
which `torch.mm` reads in order (35 %), QK-norm of q and k together (15 %), RMSNorm with its gain inside the
next matrix (13 %), rotary tables computed once (10 %), and experts chosen in plain Python (9 %).

A bf16 model is computed in fp32, and only its cache is bf16: with one row, PyTorch's bf16 products take two
to four times as long. The price is an fp32 copy of the weights. Most of the time left goes into matrix
products. `verify` of 2 or 3 tokens takes 1.4 or 1.8 times a `step`: so small a model gains little by drafts.

The prompt goes through the plain path, which stays the reference. Before this one is used, both read a few
tokens and must agree (`agree`); tests/inference/fast/test_decoder.py compares them in depth.
"""

import copy
import threading
import warnings
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from inference.fast.layer import FastLayer, Workspace, gain, joined, prepared
from inference.generation.drafting import draft
from model.caches import make_cache, make_draft_cache
from model.tinyseek import Decoder, DecoderLayer, TinySeek
from modules.attention.grouped_query import GroupedQueryAttention
from modules.attention.cache import KVCache
from modules.mlp import SwiGLU
from modules.experts.moe import Experts, MoE
from modules.mtp import ParallelMTP, SequentialMTP
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding, rotate_half, rotate_interleaved
from modules.experts.router import TopkRouter

# A model with any other part (adapters, another attention) is left to the plain path.
KNOWN_PARTS = {TinySeek, Decoder, DecoderLayer, GroupedQueryAttention, SwiGLU, RMSNorm, RotaryEmbedding}
KNOWN_PARTS |= {MoE, TopkRouter, Experts, ParallelMTP, SequentialMTP}
KNOWN_PARTS |= {nn.ModuleList, nn.Embedding, nn.Linear, nn.Dropout, nn.Identity}
COMPARED = 6  # tokens that both paths read before the fast one is trusted
ROUNDINGS = 2**12  # units in the last place of the largest logit by which they may differ: fp32 5e-4
decoders = weakref.WeakValueDictionary()  # by fingerprint: the Generators of a model share one copy of it


def supports(model) -> bool:
    """Return True if `FastDecoder` is made for models like this one."""
    return not refusal(model)


def refusal(model) -> str:
    """Return the reason why `model` needs the plain path, or an empty text."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "all modules have hooks"
    for name, part in model.named_modules():
        if type(part) not in KNOWN_PARTS:
            return f"{name or 'the model'} is of the unknown type {type(part).__name__}"
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return f"{name or 'the model'} has hooks or a forward of its own"
    for setting in ("attention_bias", "sliding_window", "final_logit_softcapping"):
        if getattr(model.config, setting):
            return f"{setting} is not supported"
    if model.config.n_group != 1 or model.model.rotary_emb.depends_on_length:
        return "groups of experts, and rotary tables that depend on the length, are not supported"
    return "" if model.lm_head.weight.device.type == "cpu" else "it is not on a CPU"


def fingerprint(model) -> tuple:
    """Return what changes when a prepared copy of `model` is out of date.

    PyTorch counts the changes to each tensor in place; only changes through `.data` escape it.
    """
    weights = (
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        for weight in (*model.parameters(), *model.buffers())
    )
    return id(model), *weights, *(type(part).forward for part in model.modules())


def prepare(model: TinySeek, state: tuple) -> "FastDecoder | None":
    """Return a decoder for `model`, whose fingerprint is `state`; None, with a warning, if results differ."""
    decoder = decoders.get(state) or FastDecoder(model)
    if state not in decoders and not agree(decoder, model):
        warnings.warn("FastDecoder and the model disagree: the slower plain path is used", stacklevel=4)
        return None
    decoders[state] = decoder
    return decoder


@torch.inference_mode()
def agree(fast: "FastDecoder", model: TinySeek) -> bool:
    """Run a few tokens through both paths; return True if their logits and drafts are the same.

    `refusal` sees types and settings. This sees a changed `forward`, whatever it does to the result.
    """
    if model.lm_head.weight.dtype != fast.dtype:  # compare in the dtype of the fast path
        model = copy.deepcopy(model).to(fast.dtype)
    count = min(COMPARED, model.config.max_position_embeddings)
    tokens = torch.linspace(0, model.config.vocab_size - 1, count).long()
    expected, cache, ids = model(tokens[None]), make_cache(model, 1, count), tokens.tolist()
    ours = [fast.verify(ids[: count // 2], cache)[0]] if count > 1 else []
    ours += [fast.step(token, cache) for token in ids[count // 2 :]]
    pairs = [(torch.cat(ours), expected.logits[0])]
    if model.mtp is not None:
        caches = [make_draft_cache(model, 1, count) for _ in range(2)]
        plain, _ = draft(model, expected.hidden, tokens[None], caches[0], last_only=True)
        pairs.append((fast.draft(expected.hidden[0], ids, caches[1])[0], plain[0]))
    most = ROUNDINGS * torch.finfo(fast.dtype).eps
    return all(bool((a - b).abs().max() <= most * b.abs().max()) for a, b in pairs)


class FastDecoder:
    """A prepared copy of a model: `step` reads one token, `verify` a few, `draft` runs the MTP head.

    The tensors that they return are never overwritten.

    Args:
        model: a `TinySeek` that `supports` accepts. The copy does not follow later training.
    """

    @torch.no_grad()
    def __init__(self, model: TinySeek):
        self.config, decoder = model.config, model.model
        self.dtype = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
        self.embedding = decoder.embed_tokens.weight.detach().clone()
        self.layers = [FastLayer(layer, self.config, self.dtype) for layer in decoder.layers]
        self.gain = gain(decoder.norm, self.dtype)
        self.lm_head = joined([model.lm_head], self.dtype)
        self.workspaces = {}
        self.prepare_draft(model.mtp)

        # Rotary tables for every position. A rotation is x cos + x[partner] sin, a permutation of channels
        # with the sign kept in the table; rotating a vector of channel numbers gives partners and signs.
        turn = rotate_interleaved if self.config.rope_interleaved else rotate_half
        signed = turn(torch.arange(1.0, self.config.head_dim + 1))
        self.partner = signed.abs().long() - 1
        cos, sin = decoder.rotary_emb(torch.arange(self.config.max_position_embeddings)[:, None])
        self.cos, self.sin = cos.to(self.dtype), (sin * signed.sign()).to(self.dtype)  # (positions, 1, D)

    def prepare_draft(self, mtp):
        """Prepare the MTP head. The token's share of the sequential head's input is a table (V, C)."""
        self.draft_layer = None
        if mtp is None:
            return
        self.draft_gain = gain(mtp.norm, self.dtype)
        if isinstance(mtp, ParallelMTP):
            self.draft_proj = joined([mtp.proj], self.dtype)
            return
        left, right = mtp.eh_proj.weight.to(self.dtype).chunk(2, dim=1)  # (C, C) each
        table = self.embedding.to(self.dtype)
        size = (table.square().mean(1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        self.draft_table = table / size * mtp.enorm.weight.to(self.dtype) @ left.T
        self.draft_proj = prepared(right, mtp.hnorm)
        self.draft_layer = FastLayer(mtp.layer, self.config, self.dtype)

    def step(self, token: int, cache: KVCache):
        """Append `token` to the one row of `cache`; return logits (1, V)."""
        return self.verify([token], cache)[0]

    @torch.inference_mode()
    def verify(self, tokens: list[int], cache: KVCache):
        """Append n tokens; return logits (n, V) after each, and the hidden states (n, C) they come from."""
        work = self.workspace(len(tokens))
        for row, token in zip(work.hidden_rows, tokens, strict=True):
            row.copy_(self.embedding[token])
        self.run(self.layers, work, cache)
        hidden = work.normed * self.gain
        return torch.mm(hidden, self.lm_head), hidden

    @torch.inference_mode()
    def draft(self, hidden, following: list[int], cache: KVCache | None = None):
        """Run the MTP head on hidden states (n, C) and the n tokens that follow them.

        Returns logits (1, V) of the token after the last, and the hidden state (1, C) that they come from.
        `cache` belongs to a sequential head.
        """
        work = self.workspace(len(hidden))
        work.hidden.copy_(hidden)
        if self.draft_layer is None:
            work.hidden.add_(F.silu(torch.mm(work.hidden, self.draft_proj)))
            work.normalise()
        else:
            work.normalise()
            for row, token in zip(work.hidden_rows, following, strict=True):
                row.copy_(self.draft_table[token])
            work.hidden.addmm_(work.normed, self.draft_proj)
            self.run([self.draft_layer], work, cache)
        hidden = work.normed_rows[-1] * self.draft_gain
        return torch.mm(hidden, self.lm_head), hidden

    def workspace(self, n: int) -> Workspace:
        """Return the places of n tokens. Threads of Python may share a decoder: each has its own."""
        key = n, threading.get_ident()
        if key not in self.workspaces:
            self.workspaces[key] = Workspace(self.config, n, self.dtype)
        return self.workspaces[key]

    def run(self, layers, work: Workspace, cache: KVCache):
        """Run `work.hidden` through `layers` and a norm without its gain, into `work.normed`."""
        start = cache.lengths[0]
        stop = start + len(work.hidden)
        if stop > min(cache.capacity, len(self.cos)):
            limits = f"the cache holds {cache.capacity}, the model {len(self.cos)}"
            raise ValueError(f"no place for token {stop - 1}: {limits}")
        rotary = self.partner, self.cos[start:stop], self.sin[start:stop]
        slots = cache.store[:, :, 0, :, start:stop].unbind()  # L times (2, G, n, D)
        seen = cache.store[:, :, :, :, :stop].unbind()  # L times (2, 1, G, S, D)
        for layer, slot, all_seen in zip(layers, slots, seen, strict=True):
            layer.forward(work, rotary, slot, all_seen)
        work.normalise()
        cache.lengths[0] = stop
