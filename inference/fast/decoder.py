"""Decode on a CPU, one token of each row at a time: what `TinySeek.forward` computes, but faster.

A small model spends most of a decoding step not on arithmetic but on overhead: every PyTorch call costs about
a microsecond, and modules, autograd and new tensors cost more. With experts (4 of 16, hidden size 256, 4
layers, fp32, one thread) the plain path makes 600 calls for a token of one row and takes 3.0 ms; this one
makes 150 and takes 0.7 ms. The largest gains are matrices stored (in, out), which `torch.mm` reads in order
(35 %), QK-norm of q and k together (15 %), RMSNorm with its gain inside the next matrix (13 %), rotary tables
computed once (10 %), and experts chosen in plain Python (9 %).

With 64 rows and experts a step is nearly twice as fast as on the plain path, for the same reasons, and since
all experts are one batched product.

One row of a bf16 model runs on an fp32 copy of its weights, and only the cache is bf16: with one row,
PyTorch's bf16 products take two to four times as long. Several such rows are left to the plain path.

Large matrices of a quantised model stay in 4, 8 or 16 bits, and decoding is faster than in fp32 for it
(modules/quantized/kernels.py).

The prompt goes through the plain path, which is the reference. Before the fast path is used, both read a few
tokens and must agree (`agree`). Drafts stay on the plain path: a product of two rows takes nearly twice as
long as one, so drafting made the fast path slower.
"""

import copy
import threading
import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from inference.fast.layer import FastAttention, FastMLP, FastMoE, FastNorm, Place, joined, product
from model.caches import make_cache
from model.tinyseek import Decoder, DecoderLayer, TinySeek
from modules.attention.grouped_query import GroupedQueryAttention
from modules.attention.cache import KVCache
from modules.attention.quantized_cache import QuantizedKVCache
from modules.mlp import SwiGLU
from modules.experts.moe import Experts, MoE
from modules.norm import RMSNorm
from modules.quantized.embedding import QuantEmbedding
from modules.quantized.layers import QuantExperts, QuantLinear
from modules.quantized.stored import StoredIntegers, StoredNF4
from modules.rope import RotaryEmbedding, pairs
from modules.experts.router import TopkRouter

# A model with any other part (adapters, another attention) is left to the plain path.
KNOWN_PARTS = {TinySeek, Decoder, DecoderLayer, GroupedQueryAttention, SwiGLU, RMSNorm, RotaryEmbedding}
KNOWN_PARTS |= {MoE, TopkRouter, Experts, nn.ModuleList, nn.Embedding, nn.Linear, nn.Dropout, nn.Identity}
KNOWN_PARTS |= {QuantLinear, QuantExperts, QuantEmbedding, StoredIntegers, StoredNF4}
COMPARED = 6  # tokens that both paths read before the fast one is trusted
ROUNDINGS = 2**12  # allowed difference, in machine epsilons of the largest logit: 5e-4 of it in fp32
QUANTIZED = 2**-4  # the same, as a part of that logit, where products run in bf16 or round their inputs
decoders = weakref.WeakValueDictionary()  # fingerprint -> decoder, shared by all Generators


def refusal(model, rows: int = 1) -> str:
    """Return the reason why `rows` of `model` need the plain path, or an empty text."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "all modules have hooks"
    for name, part in model.named_modules():
        if name.startswith("mtp"):  # drafts stay on the plain path
            continue
        if type(part) not in KNOWN_PARTS:
            return f"{name or 'the model'} is of the unknown type {type(part).__name__}"
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return f"{name or 'the model'} has hooks or a forward of its own"
    for setting in ("sliding_window", "final_logit_softcapping"):
        if getattr(model.config, setting):
            return f"{setting} is not supported"
    if model.config.n_group != 1 or model.model.rotary_emb.depends_on_length:
        return "groups of experts, and rotary tables that depend on the length, are not supported"
    if rows > 1 and model.model.norm.weight.dtype in (torch.bfloat16, torch.float16):
        return "several rows are multiplied in the dtype of the model"
    return "" if model.model.norm.weight.device.type == "cpu" else "it is not on a CPU"


def fingerprint(model) -> tuple:
    """Return a key that changes when a prepared copy of `model` is out of date.

    PyTorch counts the in-place changes of each tensor; only changes through `.data` go unnoticed.
    """
    tensors = (*model.parameters(), *model.buffers())
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    forwards = [type(part).forward for part in model.modules()]
    config = str(model.config)  # routers read it in each forward
    return id(model), config, *(tensor.data_ptr() for tensor in tensors), *versions, *forwards


@torch.inference_mode()
def agree(fast: "FastDecoder", model: TinySeek) -> bool:
    """Return True if both paths compute the same logits for a few tokens.

    `refusal` checks types and settings; this check notices a changed `forward`.
    """
    if model.model.norm.weight.dtype != fast.dtype:  # compare in the dtype of the fast path
        model = copy.deepcopy(model).to(fast.dtype)
    count = min(COMPARED, model.config.max_position_embeddings)
    tokens = torch.linspace(0, model.config.vocab_size - 1, count).long()
    expected, cache = model(tokens[None]).logits[0], make_cache(model, 1, count)
    *first, last = tokens.tolist()
    ours = [fast.step([token], cache)[0] for token in first]
    cache.select([0, 0])  # several rows take ways of their own
    ours.append(fast.step([last, last], cache)[0])
    differences = (torch.cat(ours) - torch.cat([expected, expected[-1:]])).abs().amax(1)
    differences /= expected.abs().max()
    if fast.quantized:  # rounding may decide a near tie between experts, for a few tokens
        return bool(differences.median() <= QUANTIZED)
    return bool(differences.max() <= ROUNDINGS * torch.finfo(fast.dtype).eps)


class FastDecoder:
    """A prepared copy of a model, which does not follow later training.

    Args:
        model: a `TinySeek` for which `refusal` returns no reason.
    """

    @torch.no_grad()
    def __init__(self, model: TinySeek):
        config, decoder = model.config, model.model
        self.dtype = torch.promote_types(decoder.norm.weight.dtype, torch.float32)
        self.quantized = any(isinstance(part, QuantLinear | QuantExperts) for part in model.modules())
        self.config, table = config, decoder.embed_tokens
        self.embedding = table if isinstance(table, QuantEmbedding) else table.weight.clone()
        self.lm_head = joined([model.lm_head], self.dtype, decoder.norm)
        self.lock = threading.Lock()  # threads may share a decoder and thus its memory

        # A rotation is x cos + x[partner] sin, with the sign of the first of each pair in the table of sines.
        self.partner, sign = torch.arange(config.head_dim), torch.ones(config.rotary_dim)
        first, second = pairs(torch.arange(config.rotary_dim), config.rope_interleaved)
        self.partner[first], self.partner[second], sign[first] = second, first, -1.0
        cos, sin = decoder.rotary_emb(torch.arange(config.max_position_embeddings))
        rest = (0, config.head_dim - config.rotary_dim)  # channels that do not rotate: cos 1, sin 0
        cos, sin = F.pad(cos, rest, value=1.0), F.pad(sin * sign, rest)
        self.cos, self.sin = cos.to(self.dtype), sin.to(self.dtype)  # (positions, D)

        self.layers = [self.parts(layer, config) for layer in decoder.layers]
        self.hold(1)

    def parts(self, layer: DecoderLayer, config):
        """Return the attention and the feed-forward of `layer`, each with the gain of the norm before it."""
        attention = FastAttention(layer.self_attn, layer.input_layernorm, config, self.dtype, self.partner)
        if layer.has_experts:
            return attention, FastMoE(layer.mlp, layer.post_attention_layernorm, config, self.dtype)
        return attention, FastMLP(layer.mlp, layer.post_attention_layernorm, self.dtype)

    def hold(self, B: int) -> None:
        """Make the memory for B rows."""
        self.hidden = torch.empty(B, self.config.hidden_size, dtype=self.dtype)
        self.norm = FastNorm(torch.empty_like(self.hidden), self.config.rms_norm_eps)
        for part in (part for layer in self.layers for part in layer):
            part.hold(B)

    @torch.inference_mode()
    def step(self, tokens: list[int], cache: KVCache, new: list[int] | None = None, record: bool = False):
        """Append a token to each row of `cache`; return logits (B, V), which are never overwritten, and the
        routing of each layer with experts, for one row only with `record`.

        new: 0 for a row that has ended: it stays as it is, and its logits mean nothing; None: all go on.
        """
        B, lengths = len(tokens), cache.lengths
        new = [1] * B if new is None else new
        ends = [length + one for length, one in zip(lengths, new, strict=True)]
        if max(ends) > min(cache.capacity, len(self.cos)):
            limits = f"the cache holds {cache.capacity}, the model {len(self.cos)}"
            raise ValueError(f"no place for token {max(ends) - 1}: {limits}")
        routings, last, capacity = [], ends[0] - 1, cache.store.shape[4]
        coded = isinstance(cache, QuantizedKVCache)
        # Rows attend to all slots if half are in use: gaps between rows cost more than hidden slots.
        S = capacity if B > 1 and not coded and 2 * max(ends) >= capacity else max(ends)
        place = Place(self.cos[last], self.sin[last]) if B == 1 else self.place(ends, new, cache, S)
        seen = cache.store[:, :, :, :, :S].unbind()  # L times (2, B, G, S, D)
        if coded:  # it stores new tokens itself, and decodes the others
            cache.begin(1, None if all(new) else new)
            stores, seen = [partial(cache.append, layer) for layer in range(len(seen))], [None] * len(seen)
        elif B == 1:
            stores = cache.store[:, :, :, :, last].transpose(1, 2).unbind()  # L times (1, 2, G, D)
        else:
            stores = cache.store.flatten(1, 4).unbind()  # L times (2*B*G*capacity, D)
        with self.lock:
            if len(self.hidden) != B:
                self.hold(B)
            if isinstance(self.embedding, QuantEmbedding):
                self.hidden.copy_(self.embedding(torch.tensor(tokens)))
            else:
                self.hidden.copy_(self.embedding[tokens if B > 1 else tokens[0]])
            for (attention, mlp), store, part in zip(self.layers, stores, seen, strict=True):
                attention.add(self.hidden, self.norm(self.hidden), place, store, part)
                if isinstance(mlp, FastMoE) and (B > 1 or record):
                    routings.append(mlp.add_many(self.hidden, self.norm(self.hidden)))
                else:
                    mlp.add(self.hidden, self.norm(self.hidden))
            if coded:
                cache.advance()
            cache.lengths = ends
            logits = torch.empty(B, self.config.vocab_size, dtype=self.dtype)
            product(self.norm(self.hidden), self.lm_head, None, logits)
            return logits, routings

    def place(self, ends: list[int], new: list[int], cache: KVCache, S: int) -> Place:
        """Return the place of the new tokens, the last of several rows that have `ends` tokens with them and
        attend to S slots."""
        _, parts, B, G, capacity, _ = cache.store.shape
        last, rows = torch.tensor(ends) - 1, None if all(new) else torch.tensor(new).nonzero()[:, 0]
        first = torch.arange(0, parts * B * G * capacity, capacity).view(parts, B, G).transpose(0, 1)
        slots = first + last[:, None, None]  # (B, 2, G)
        hidden = torch.arange(S) > last[:, None]  # (B, S)
        bias = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
        slots = (slots if rows is None else slots[rows]).flatten()
        return Place(self.cos[last, None], self.sin[last, None], slots, rows, bias)
