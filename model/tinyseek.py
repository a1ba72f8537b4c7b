"""The TinySeek decoder: token embedding, a stack of pre-norm layers, a final norm, an output head.

    h = embed(ids)
    for each layer:   h = h + attention(norm(h));   h = h + feed_forward(norm(h))
    logits = lm_head(norm(h))

Pre-norm: each block reads a normalised copy of the residual stream and adds its output to it, so gradients
pass through unchanged (arXiv 2002.04745). The feed-forward is a SwiGLU or a mixture of experts, the attention
is grouped-query or latent, and a second prediction head (MTP) is optional.

The same weights give the same logits in Hugging Face's `...ForCausalLM` of Llama, Qwen2 and Qwen3 (dense),
Dots1, Qwen2Moe and Qwen3Moe (experts), DeepseekV2 and DeepseekV3 (latent attention too). The parameters have
the same names, but for the shared experts of Qwen2Moe.

    input_ids: (B, T) -> hidden (B, T, C) -> logits (B, T, V)
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from config.model import ModelConfig
from modules.attention.context import AttentionContext, layer_contexts
from modules.attention.dual_chunk import DualChunkAttention, DualChunkRotary
from modules.attention.grouped_query import GroupedQueryAttention
from modules.attention.latent import LatentAttention
from modules.checkpointing import CheckpointedLayer
from modules.cross_entropy import linear_cross_entropy, soft_cap
from modules.experts.moe import MoE
from modules.experts.router import Routing
from modules.mlp import SwiGLU
from modules.mtp import ParallelMTP, SequentialMTP, mtp_labels, next_ids
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding


class DecoderOutput(NamedTuple):
    """The output of the decoder, and what an MTP layer needs."""

    hidden: torch.Tensor  # (B, T, C), after the final norm
    routings: list[Routing]  # of each layer with experts
    context: AttentionContext  # of the layer after the last, that of sequential MTP
    rotary: tuple[torch.Tensor, torch.Tensor]


@dataclass
class CausalLMOutput:
    """Logits, or the loss if labels were given. Divide the sums by the supervised tokens of a step."""

    hidden: torch.Tensor  # (B, T, C), the input of the output head
    routings: list[Routing] = field(default_factory=list)  # the MTP layer's last
    logits: torch.Tensor | None = None  # (B, T, V), or (B, 1, V) with `last_only`
    loss_sum: torch.Tensor | None = None  # (), cross-entropy summed over the supervised tokens
    nll: torch.Tensor | None = None  # (N,), cross-entropy of each supervised token, without gradient
    mtp_loss_sum: torch.Tensor | None = None  # (), the same sum for the tokens after the next


class DecoderLayer(CheckpointedLayer):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream (B, T, C). Its
    number `layer` decides whether it has experts; `slot` is its place in the cache."""

    def __init__(self, config: ModelConfig, layer: int, slot: int | None = None):
        super().__init__()
        grouped = DualChunkAttention if config.dual_chunk_attention_config else GroupedQueryAttention
        attention = LatentAttention if config.attention_kind == "mla" else grouped
        self.self_attn = attention(config, layer if slot is None else slot)
        self.has_experts = config.is_moe_layer(layer)
        dense = (config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.mlp = MoE(config) if self.has_experts else SwiGLU(*dense)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden, context, rotary, cache=None):
        """(B, T, C) -> (B, T, C) and the routing of the tokens (None without experts)."""
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), context, rotary, cache))
        out = self.mlp(self.post_attention_layernorm(hidden))
        out, routing = out if self.has_experts else (out, None)
        return hidden + self.dropout(out), routing


class Decoder(nn.Module):
    """Embedding, layers and final norm. The arguments of `forward` are described at `TinySeek.forward`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        angles = (config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        rotary, chunks = RotaryEmbedding(*angles, config.rope_interleaved), config.dual_chunk_attention_config
        self.rotary_emb = DualChunkRotary(rotary, chunks) if chunks else rotary
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, input_ids, position_ids=None, document_ids=None, padding_mask=None, cache=None, new_tokens=None,
        prefix=None,
    ) -> DecoderOutput:  # fmt: skip
        """Compute positions, mask and rotary tables once, then run all layers."""
        if cache is not None:
            cache.begin(input_ids.shape[1], new_tokens)
        windows = [self.config.layer_window(n) for n in range(len(self.layers) + 1)]  # the last is MTP's
        contexts = layer_contexts(
            windows, input_ids.shape[1], input_ids.device, cache=cache, sinks=self.config.attention_sinks,
            position_ids=position_ids, document_ids=document_ids, padding_mask=padding_mask,
            prefix=0 if prefix is None else prefix.length,
        )  # fmt: skip
        rotary = self.rotary_emb(contexts[windows[-1]].positions, None if cache is None else cache.planned)
        hidden, routings = self.dropout(self.embed_tokens(input_ids)), []  # (B, T, C)
        for layer, window in zip(self.layers, windows):
            hidden, routing = layer(hidden, contexts[window], rotary, cache or prefix)  # the cache has it too
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.advance()
        return DecoderOutput(self.norm(hidden), routings, contexts[windows[-1]], rotary)


class TinySeek(nn.Module):
    """The language model. Parameters are named as in Hugging Face's `...ForCausalLM`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.prefix = None  # or trained keys and values in front of all text (modules/adapters/prefix.py)
        self.mtp = ParallelMTP(config) if config.mtp == "parallel" else None
        if config.mtp == "sequential":
            self.mtp = SequentialMTP(config, DecoderLayer(config, config.num_hidden_layers, slot=0))
        self.init_weights()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def prefix_length(self) -> int:
        """The number of positions that the prefix takes; text follows it."""
        return 0 if self.prefix is None else self.prefix.length

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every matrix from N(0, initializer_range); biases become zero, gains stay one.

        With `zero_init_residual` the last matrix of each block is zero: every layer starts as the identity.
        """
        last = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, self.config.initializer_range)
            elif name.endswith("bias"):
                parameter.zero_()
            if self.config.zero_init_residual and name.endswith(last):
                parameter.zero_()

    def forward(
        self, input_ids, labels=None, *, position_ids=None, document_ids=None, padding_mask=None, cache=None,
        new_tokens=None, last_only=False, mtp=False,
    ) -> CausalLMOutput:  # fmt: skip
        """Run the model on `input_ids` (B, T).

        Args:
            labels: (B, T), already shifted by the data set: labels[b, t] is the token that follows
                input_ids[b, t], or -100 for none. With labels, the output holds the loss and no logits.
            position_ids: (B, T) for rotary embeddings; default 0, 1, 2, ... (after a prefix).
            document_ids: (B, T) numbers of the texts packed into one row, which do not see each other.
            padding_mask: (B, T), True for real tokens.
            cache: past keys and values; the new tokens are appended to it.
            new_tokens: with a cache, the number of real tokens per row; the rest of the T columns is padding.
            last_only: return only the logits of each row's last real token (of any token if it has none).
            mtp: with labels, also compute the loss of the MTP head.
        """
        body = self.model(input_ids, position_ids, document_ids, padding_mask, cache, new_tokens, self.prefix)
        hidden, output = body.hidden, CausalLMOutput(body.hidden, body.routings)
        if labels is not None:
            output.loss_sum, output.nll = self.cross_entropy(hidden, labels)
            if mtp:
                following = self.model.embed_tokens(next_ids(input_ids))  # (B, T, C)
                context = body.context.without_prefix(self.prefix_length)
                second, routing = self.mtp(hidden, following, context, body.rotary)
                output.mtp_loss_sum, _ = self.cross_entropy(second, mtp_labels(labels, document_ids))
                output.routings += [] if routing is None else [routing]
            return output
        if last_only and new_tokens is None:
            hidden = hidden[:, -1:]  # (B, 1, C)
        elif last_only:
            hidden = hidden[torch.arange(len(hidden)), torch.tensor(new_tokens) - 1, None]  # (B, 1, C)
        output.logits = self.logits(hidden)
        return output

    def logits(self, hidden):
        """(B, T, C) -> (B, T, V)."""
        return soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping)

    def cross_entropy(self, hidden, labels):
        """hidden (B, T, C), labels (B, T) -> loss summed over the supervised tokens, and nll (N,) of each."""
        cap = self.config.final_logit_softcapping
        return linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten(), cap)
