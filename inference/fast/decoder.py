"""One row, a few tokens at a time, on a CPU: what `TinySeek.forward` computes, in a quarter of its time.

A small model spends most of a decoding step not on arithmetic but on the way to it: every PyTorch call costs
about a microsecond, every module, autograd function and new tensor some more. With experts (4 of 16, hidden
size 256, 4 layers, fp32, one thread) the plain path makes 600 calls a token and takes 3.0 ms; this one makes
150, most of them into places that were made once, and takes 0.7 ms. How much longer without each trick:

    matrices stored (in, out), which `torch.mm` reads in order                   35 %
    QK-norm of q and k together, in place                                        15 %
    RMSNorm in three calls, its gain inside the next matrix                      13 %
    rotary tables for all positions, made once                                   10 %
    the rotation as one signed exchange, for all heads of q and k together        9 %
    a token's experts chosen in plain Python                                      9 %
    gate and up of an expert as one matrix                                        7 %
    q, k and v as one matrix                                                      5 %
    the router's weights as factors of `addmm_`                                   4 %

A model in bf16 is computed in fp32, and only its cache is bf16: a product of one row takes PyTorch two to
four times as long in bf16, and a dense model is 1.6 times as fast this way. The price is twice the memory.

What is left are mostly the matrix products, of which one of two rows takes 1.4 to 1.8 times as long as one of
one row. So `verify` of 2 or 3 tokens takes 1.4 or 1.8 times a `step` (2 shared experts, V = 4096), a `draft`
0.3 with the sequential head and 0.1 with the parallel one. With the weights of both taking turns in the
processor's cache, a round with one draft takes 2.0 steps, or 1.6: so small a model gains little by drafts.

A prompt goes through the plain path, which is best at many tokens, and the answer through this one. The
plain path stays the reference; tests/inference/fast/test_decoder.py holds the two against each other.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from inference.fast.layer import FastLayer, Workspace, gain, joined, prepared
from model.tinyseek import Decoder, DecoderLayer, TinySeek
from modules.attention.grouped_query import GroupedQueryAttention
from modules.attention.cache import KVCache
from modules.mlp import SwiGLU
from modules.experts.moe import Experts, MoE
from modules.mtp import ParallelMTP, SequentialMTP
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding, rotate_half, rotate_interleaved
from modules.experts.router import TopkRouter

# What this file knows how to use, numbers as stars. A model with any other part or weight (adapters, biases,
# another attention) is left to the plain path.
KNOWN_PARTS = {TinySeek, Decoder, DecoderLayer, GroupedQueryAttention, SwiGLU, RMSNorm, RotaryEmbedding}
KNOWN_PARTS |= {MoE, TopkRouter, Experts, ParallelMTP, SequentialMTP}
KNOWN_PARTS |= {nn.ModuleList, nn.Embedding, nn.Linear, nn.Dropout, nn.Identity}
MLP = {f"{one}_proj.weight" for one in ("gate", "up", "down")}
LAYER = {f"self_attn.{one}_proj.weight" for one in "qkvo"} | {f"self_attn.{one}_norm.weight" for one in "qk"}
LAYER |= {f"{one}.weight" for one in ("input_layernorm", "post_attention_layernorm", "mlp.gate")}
LAYER |= {f"mlp.{one}" for one in MLP} | {f"mlp.shared_experts.{one}" for one in MLP}
LAYER |= {f"mlp.experts.{one}_proj" for one in ("gate_up", "down")} | {"mlp.gate.e_score_correction_bias"}
KNOWN_WEIGHTS = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
KNOWN_WEIGHTS |= {f"{where}.{one}" for where in ("model.layers.*", "mtp.layer") for one in LAYER}
KNOWN_WEIGHTS |= {f"mtp.{one}.weight" for one in ("proj", "norm", "enorm", "hnorm", "eh_proj")}


def supports(model) -> bool:
    """True if `FastDecoder` computes what `model` computes; if not, the plain path has to do it."""
    return (
        {type(part) for part in model.modules()} <= KNOWN_PARTS
        and {re.sub(r"\.\d+\.", ".*.", name) for name in model.state_dict()} <= KNOWN_WEIGHTS
        and model.config.sliding_window is None
        and model.config.final_logit_softcapping is None
        and model.config.n_group == 1
        and not model.model.rotary_emb.depends_on_length
        and model.lm_head.weight.device.type == "cpu"  # the router's choice is read: on a GPU that is a wait
    )


class FastDecoder:
    """`step(token, cache)` pushes one token through a prepared copy of the model's weights, `verify` a few at
    once, `draft` the MTP head. What they return is theirs to keep.

    Args:
        model: a `TinySeek` for which `supports(model)` holds. The copy does not follow later training.
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

        # Rotary tables for every position. A turn is a signed exchange of channels, x cos + x[partner] sin,
        # with the sign kept in the table; the partners are read off a vector of channel numbers, turned.
        turn = rotate_interleaved if self.config.rope_interleaved else rotate_half
        signed = turn(torch.arange(1.0, self.config.head_dim + 1))
        self.partner = signed.abs().long() - 1
        cos, sin = decoder.rotary_emb(torch.arange(self.config.max_position_embeddings)[:, None])
        self.cos, self.sin = cos.to(self.dtype), (sin * signed.sign()).to(self.dtype)  # (positions, 1, D)

    def prepare_draft(self, mtp):
        """The MTP head's matrices. What the sequential one makes of a token before it looks at any hidden
        state is a table (V, C)."""
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
        """Append `token` to the one row of `cache`; returns logits (1, V)."""
        return self.verify([token], cache)[0]

    @torch.inference_mode()
    def verify(self, tokens: list[int], cache: KVCache):
        """Append n tokens; returns logits (n, V) after each, and the hidden states (n, C) they come from."""
        work = self.workspace(len(tokens))
        for row, token in zip(work.hidden_rows, tokens, strict=True):
            row.copy_(self.embedding[token])
        self.run(self.layers, work, cache)
        hidden = work.normed * self.gain
        return torch.mm(hidden, self.lm_head), hidden

    @torch.inference_mode()
    def draft(self, hidden, following: list[int], cache: KVCache | None = None):
        """The MTP head reads hidden states (n, C) and the n tokens after them; `cache`: the sequential one's.

        Returns logits (1, V) of the token after the last, and the hidden state (1, C) that they come from.
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
        """The places of n tokens, made at the first call."""
        if n not in self.workspaces:
            self.workspaces[n] = Workspace(self.config, n, self.dtype)
        return self.workspaces[n]

    def run(self, layers, work: Workspace, cache: KVCache):
        """`work.hidden` through the layers of `cache` and a norm without its gain, into `work.normed`."""
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
