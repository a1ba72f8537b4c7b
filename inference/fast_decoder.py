"""One token at a time, batch 1, on a CPU: the same tokens as `TinySeek.forward`, more than twice as fast.

A small model spends most of a decoding step not on arithmetic but on the way to it: every PyTorch call costs
about a microsecond, every module, autograd function and new tensor some more. The plain path makes some 400
calls a token at 4 layers; this one makes 105, most of them into buffers that were made once: 0.55 ms a token
instead of 1.52 (hidden size 256, fp32, one thread). How much longer a token takes without each trick:

    the rotation as one signed exchange, for all heads of q and k together       31 %
    matrices stored (in, out), which `torch.mm` reads in order, and no copies    26 %
    QK-norm of q and k together, in place                                        25 %
    RMSNorm as one number, its gains inside the next matrix                      21 %
    rotary tables for all positions, made once                                    7 %
    q, k and v as one matrix                                                      7 %
    gate and up as one matrix                                                     1 %

What is left is mostly the reading of the weights, once a token.

    token id -> logits (1, V), one `step` per token, on the `KVCache` of the plain path

A prompt goes through the plain path, which is best at many tokens, and the answer through this one. The
plain path stays the reference; tests/inference/test_fast_decoder.py holds the two against each other.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from model.tinyseek import Decoder, DecoderLayer, TinySeek
from modules.attention import GroupedQueryAttention
from modules.cache import KVCache
from modules.mlp import SwiGLU
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding, rotate_half, rotate_interleaved

# What this file knows how to use, layer numbers as stars. A model with any other part or weight (experts,
# adapters, biases, another attention) is left to the plain path.
KNOWN_PARTS = {TinySeek, Decoder, DecoderLayer, GroupedQueryAttention, SwiGLU, RMSNorm, RotaryEmbedding}
KNOWN_PARTS |= {nn.ModuleList, nn.Embedding, nn.Linear, nn.Dropout, nn.Identity}
KNOWN_WEIGHTS = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
KNOWN_WEIGHTS |= {f"model.layers.*.self_attn.{one}_proj.weight" for one in "qkvo"}
KNOWN_WEIGHTS |= {f"model.layers.*.self_attn.{one}_norm.weight" for one in "qk"}
KNOWN_WEIGHTS |= {f"model.layers.*.mlp.{one}.weight" for one in ("gate_proj", "up_proj", "down_proj")}
KNOWN_WEIGHTS |= {f"model.layers.*.{one}.weight" for one in ("input_layernorm", "post_attention_layernorm")}


def supports(model) -> bool:
    """True if `FastDecoder` computes what `model` computes; if not, the plain path has to do it."""
    return (
        {type(part) for part in model.modules()} <= KNOWN_PARTS
        and {re.sub(r"\.\d+\.", ".*.", name) for name in model.state_dict()} <= KNOWN_WEIGHTS
        and model.config.sliding_window is None
        and model.config.final_logit_softcapping is None
        and not model.model.rotary_emb.depends_on_length
        and model.lm_head.weight.device.type == "cpu"  # `normalise` reads a number: on a GPU that is a wait
    )


class FastDecoder:
    """`step(token, cache)` pushes one token through a prepared copy of the model's weights.

    Args:
        model: a `TinySeek` for which `supports(model)` holds. The copy does not follow later training.
    """

    @torch.no_grad()
    def __init__(self, model: TinySeek):
        config, decoder = model.config, model.model
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.embedding, self.dtype = decoder.embed_tokens.weight.detach().clone(), model.lm_head.weight.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)  # for sums of squares, as in the norms
        self.eps = config.rms_norm_eps
        self.layers = [self.prepare(layer, config) for layer in decoder.layers]
        self.lm_head = self.joined([model.lm_head], decoder.norm)

        # Rotary tables for every position. A turn is a signed exchange of channels, x cos + x[partner] sin,
        # with the sign kept in the table; the partners are read off a vector of channel numbers, turned.
        turn = rotate_interleaved if config.rope_interleaved else rotate_half
        signed = turn(torch.arange(1.0, D + 1))
        self.partner = signed.abs().long() - 1
        cos, sin = decoder.rotary_emb(torch.arange(config.max_position_embeddings)[None])  # (1, positions, D)
        self.cos, self.sin = cos[0].to(self.dtype), (sin[0] * signed.sign()).to(self.dtype)

        # Every intermediate result has a place of its own, made once, and so have the views into it.
        def place(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype)

        self.hidden, self.normed = place(1, config.hidden_size), place(1, config.hidden_size)
        self.qkv = place(1, (H + 2 * G) * D)
        self.qk = self.qkv.view(-1, D)[: H + G]  # (H+G, D)
        self.q = self.qkv[:, : H * D].view(1, G, H // G, D)  # the query heads of one group side by side
        self.kv = self.qkv[:, H * D :].view(2, G, D)
        self.sizes, self.turned = place(H + G, 1, dtype=self.wide), place(H + G, D)
        self.root_eps = torch.tensor(math.sqrt(D * self.eps), dtype=self.wide)
        self.gate_up = place(1, 2 * config.intermediate_size)
        self.gate, self.up = self.gate_up.chunk(2, dim=1)  # (1, F) each
        self.logits = place(1, config.vocab_size)

    def joined(self, linears, norm=None):
        """Linear layers (out, in) that read the same input, as one matrix (in, sum of outs).

        The gain of the norm before them scales their inputs, so it can scale the matrix instead, once.
        """
        weight = torch.cat([linear.weight for linear in linears]).to(self.wide)
        if norm is not None:
            weight = weight * norm.weight.to(self.wide)
        return weight.t().to(self.dtype).contiguous()

    def prepare(self, layer, config):
        """The four matrices of a layer, and between them the gains (H+G, D) of QK-norm, or None."""
        attention, mlp = layer.self_attn, layer.mlp
        gains = None
        if config.qk_norm:
            # RMSNorm divides by norm / sqrt(D); here the division is by the norm, and the gain has sqrt(D).
            heads = [config.num_attention_heads, config.num_key_value_heads]
            both = [attention.q_norm.weight, attention.k_norm.weight]
            gains = torch.cat([gain.expand(n, -1) for gain, n in zip(both, heads, strict=True)])
            gains = (gains.to(self.wide) * config.head_dim**0.5).to(self.dtype)
        return (
            self.joined([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm),
            gains,
            self.joined([attention.o_proj]),
            self.joined([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm),
            self.joined([mlp.down_proj]),
        )

    def normalise(self):
        """`self.normed` = `self.hidden` / its root mean square; the gain is in the next matrix."""
        norm = torch.linalg.vector_norm(self.hidden, dtype=self.wide).item()
        torch.mul(self.hidden, (norm * norm / self.hidden.shape[1] + self.eps) ** -0.5, out=self.normed)

    @torch.inference_mode()
    def step(self, token: int, cache: KVCache):
        """Append `token` to the one row of `cache`; returns logits (1, V), which the next step overwrites."""
        index = cache.lengths[0]
        if index >= min(cache.capacity, len(self.cos)):
            limits = f"the cache holds {cache.capacity}, the model {len(self.cos)}"
            raise ValueError(f"no place for token {index}: {limits}")
        cos, sin = self.cos[index], self.sin[index]  # (D,)
        slots = cache.store[:, :, 0, :, index].unbind()  # L times (2, G, D): where the new key and value go
        seen = cache.store[:, :, :, :, : index + 1].unbind()  # L times (2, 1, G, S, D): what may be looked at
        self.hidden.copy_(self.embedding[token])
        for layer, slot, (keys, values) in zip(self.layers, slots, seen, strict=True):
            qkv, gains, out, gate_up, down = layer
            self.normalise()
            torch.mm(self.normed, qkv, out=self.qkv)
            if gains is not None:  # hypot(norm, sqrt(D eps)) is the root of norm^2 + D eps
                torch.linalg.vector_norm(self.qk, dim=1, keepdim=True, dtype=self.wide, out=self.sizes)
                self.qk.div_(self.sizes.hypot_(self.root_eps)).mul_(gains)
            torch.index_select(self.qk, 1, self.partner, out=self.turned)
            self.qk.mul_(cos).addcmul_(self.turned, sin)
            slot.copy_(self.kv)
            # The H/G query heads of a group pass for H/G queries of one head: keys need no copies.
            attended = F.scaled_dot_product_attention(self.q, keys, values)
            self.hidden.addmm_(attended.view(1, -1), out)
            self.normalise()
            torch.mm(self.normed, gate_up, out=self.gate_up)
            self.hidden.addmm_(F.silu(self.gate, inplace=True).mul_(self.up), down)
        self.normalise()
        cache.lengths[0] = index + 1
        return torch.mm(self.normed, self.lm_head, out=self.logits)
