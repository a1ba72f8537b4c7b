"""The TinySeek decoder: token embedding, a stack of pre-norm layers, a final norm, an output head.

    h = embed(ids)
    for each layer:   h = h + attention(norm(h));   h = h + feed_forward(norm(h))
    logits = lm_head(norm(h))

Pre-norm: each block reads a normalised copy and adds its answer to the residual stream, so gradients pass the
stack unchanged (Xiong et al., arXiv 2002.04745). The feed-forward is one SwiGLU or a mixture of experts, the
attention grouped-query or latent; a second prediction head (MTP) may sit on top.

The same weights give the same logits in Hugging Face's `Qwen3ForCausalLM` (dense), `Dots1ForCausalLM` (with
experts), `Qwen3MoeForCausalLM` (softmax router, no shared expert) and `DeepseekV3ForCausalLM` (with latent
attention): parameters have the same names.

    input_ids: (B, T) -> hidden (B, T, C) -> logits (B, T, V)
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from config.model import ModelConfig
from modules.attention.grouped_query import GroupedQueryAttention
from modules.attention.context import AttentionContext, build_context
from modules.attention.cache import KVCache, RollingKVCache
from modules.cross_entropy import linear_cross_entropy, soft_cap
from modules.attention.latent_cache import LatentCache
from modules.attention.latent import LatentAttention
from modules.mlp import SwiGLU
from modules.experts.moe import MoE
from modules.mtp import ParallelMTP, SequentialMTP, mtp_labels, next_ids
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding
from modules.experts.router import Routing


@dataclass
class CausalLMOutput:
    """What a forward gives: logits (B, T, V), or, where labels were given, the loss instead.

    Attributes:
        logits: (B, T, V) or None.
        loss_sum: (), cross-entropy summed over the supervised tokens; divide by their number per step.
        nll: (N,), cross-entropy of each supervised token, without gradient.
        mtp_loss_sum: (), that of the tokens after the next, summed, where it was asked for.
        hidden: (B, T, C), what the heads read.
        routings: where the tokens went, one for each layer with experts (that of MTP last).
    """

    logits: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    mtp_loss_sum: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    routings: list[Routing] = field(default_factory=list)


class DecoderOutput(NamedTuple):
    """What the decoder gives: hidden states (B, T, C) after the last norm, routings of the layers with
    experts, and the context and rotary tables that all layers read."""

    hidden: torch.Tensor
    routings: list[Routing]
    context: AttentionContext
    rotary: tuple[torch.Tensor, torch.Tensor]


class DecoderLayer(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream (B, T, C).

    `layer` is its number, which decides whether it has experts; `slot` its place in the cache.
    """

    def __init__(self, config: ModelConfig, layer: int, slot: int | None = None):
        super().__init__()
        attention = LatentAttention if config.attention_kind == "mla" else GroupedQueryAttention
        self.self_attn = attention(config, layer if slot is None else slot)
        self.has_experts = config.is_moe_layer(layer)
        self.mlp = MoE(config) if self.has_experts else SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden, context, rotary, cache=None):
        """(B, T, C) -> (B, T, C), and the routing of its tokens (None without experts)."""
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), context, rotary, cache))
        out, routing = self.mlp(self.post_attention_layernorm(hidden)), None
        if self.has_experts:
            out, routing = out
        return hidden + self.dropout(out), routing


class Decoder(nn.Module):
    """Embedding, layers and final norm: ids (B, T) -> `DecoderOutput` with hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(
            config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings,
            config.rope_interleaved,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        input_ids,
        position_ids=None,
        document_ids=None,
        padding_mask=None,
        cache=None,
        new_tokens=None,
        prefix=None,
    ):
        """See `TinySeek.forward`; `prefix` is its own. Positions, masks and rotary tables are made here, once
        for all layers."""
        tokens = input_ids.shape[1]
        if cache is not None:
            cache.begin(tokens, new_tokens)
        context = build_context(
            tokens, input_ids.device, window=self.config.sliding_window, position_ids=position_ids,
            document_ids=document_ids, padding_mask=padding_mask, cache=cache,
            prefix=0 if prefix is None else prefix.length,
        )  # fmt: skip
        past = prefix if cache is None else cache  # a cache starts with the prefix
        hidden = self.dropout(self.embed_tokens(input_ids))  # (B, T, C)
        rotary = self.rotary_emb(context.positions)
        routings = []
        for layer in self.layers:
            hidden, routing = layer(hidden, context, rotary, past)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.advance()
        return DecoderOutput(self.norm(hidden), routings, context, rotary)


class TinySeek(nn.Module):
    """The language model. Parameters are named as in Hugging Face's `...ForCausalLM`.

    Attributes:
        prefix: learned keys and values before all text (modules/adapters/prefix.py), or None. Text has its
        places
            after them: of `max_position_embeddings` places the prefix takes `prefix_length`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.prefix = None
        self.mtp = None
        if config.mtp == "parallel":
            self.mtp = ParallelMTP(config)
        if config.mtp == "sequential":
            self.mtp = SequentialMTP(config, DecoderLayer(config, config.num_hidden_layers, slot=0))
        self.init_weights()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every matrix from N(0, initializer_range), biases zero, gains one. No initialisation is elsewhere.

        With `zero_init_residual` the last matrix of each block starts at zero, so that every layer begins as
        the identity and the first steps are those of a shallow model.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, self.config.initializer_range)
            elif name.endswith("bias"):
                parameter.zero_()
            last = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
            if self.config.zero_init_residual and name.endswith(last):
                parameter.zero_()

    def forward(
        self,
        input_ids,
        labels=None,
        *,
        position_ids=None,
        document_ids=None,
        padding_mask=None,
        cache=None,
        new_tokens=None,
        last_only=False,
        mtp=False,
    ) -> CausalLMOutput:
        """One forward.

        Args:
            input_ids: (B, T).
            labels: (B, T); labels[b, t] is the token that follows input_ids[b, t], or -100 for none. The
                shift happened in the data set; there is none here. With labels the output holds the loss and
                no logits.
            position_ids: (B, T) places for rotary embeddings; default 0, 1, 2, .. (after a prefix)
            document_ids: (B, T) texts packed into one row, which then do not see each other.
            padding_mask: (B, T), True for real tokens.
            cache: past keys and values; grows by the new tokens.
            new_tokens: real tokens per row, where the rest of a row's T columns is padding (with a cache).
            last_only: logits of each row's last token only, (B, 1, V): all that generation needs.
                With `new_tokens` the last real one (a row with 0 of them gets a logit without meaning);
                `padding_mask` is not looked at.
            mtp: with labels, also the loss of the tokens after the next (the model must have that head).
        """
        decoded = self.model(
            input_ids, position_ids, document_ids, padding_mask, cache, new_tokens, self.prefix
        )
        hidden, routings = decoded.hidden, decoded.routings
        if labels is not None:
            output = CausalLMOutput(hidden=hidden, routings=routings)
            output.loss_sum, output.nll = self.cross_entropy(hidden, labels)
            if mtp:
                context = decoded.context.without_prefix(self.prefix_length)
                second, routing = self.look_further(hidden, next_ids(input_ids), context, decoded.rotary)
                output.mtp_loss_sum, _ = self.cross_entropy(second, mtp_labels(labels, document_ids))
                output.routings = routings + ([routing] if routing is not None else [])
            return output
        everything = hidden
        if last_only and new_tokens is not None:
            last = torch.tensor(new_tokens, device=hidden.device) - 1
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last, None]  # (B, 1, C)
        elif last_only:
            hidden = hidden[:, -1:]
        return CausalLMOutput(logits=self.logits(hidden), hidden=everything, routings=routings)

    def logits(self, hidden):
        """(B, T, C) -> (B, T, V)."""
        return soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping)

    def cross_entropy(self, hidden, labels):
        """hidden (B, T, C), labels (B, T) -> loss summed over the labelled tokens, and nll (N,) of each."""
        return linear_cross_entropy(
            hidden.flatten(0, 1),  # (B*T, C)
            self.lm_head.weight,
            labels.flatten(),  # (B*T,)
            self.config.final_logit_softcapping,
        )

    def look_further(self, hidden, following, context, rotary, cache=None):
        """What the MTP head makes of hidden states (B, T, C) and the tokens (B, T) that follow them.

        Returns hidden states (B, T, C) that predict the token after the next, and the routing of its layer.
        """
        if self.config.mtp == "parallel":
            return self.mtp(hidden), None
        return self.mtp(hidden, self.model.embed_tokens(following), context, rotary, cache)

    def draft(self, hidden, following, cache=None, last_only=False):
        """Logits (B, T, V) of the token after the next, and the head's hidden states (B, T, C). `last_only`:
        logits (B, 1, V) of the last column.

        hidden (B, T, C) of the trunk (or of the head itself, to look still further), following (B, T) the
        token after each; cache: of `make_draft_cache`, for the sequential head.
        """
        tokens = following.shape[1]
        if cache is not None:
            cache.begin(tokens)
        context = build_context(tokens, hidden.device, window=self.config.sliding_window, cache=cache)
        rotary = self.model.rotary_emb(context.positions)
        second, _ = self.look_further(hidden, following, context, rotary, cache)
        if cache is not None:
            cache.advance()
        return self.logits(second[:, -1:] if last_only else second), second

    @property
    def prefix_length(self) -> int:
        """How many places the prefix takes before all text."""
        return 0 if self.prefix is None else self.prefix.length

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache for `batch_size` rows of at most `capacity` tokens, in the model's dtype. It holds nothing
        but the prefix, for which it has more room."""
        cache = self.empty_cache(self.config.num_hidden_layers, batch_size, capacity + self.prefix_length)
        if self.prefix is not None:
            self.prefix.start(cache)
        return cache

    def make_draft_cache(self, batch_size: int, capacity: int) -> KVCache | None:
        """The cache of the sequential MTP head, one layer deep, without prefix; None for a model without
        that head."""
        return self.empty_cache(1, batch_size, capacity) if self.config.mtp == "sequential" else None

    def empty_cache(self, layers: int, batch_size: int, capacity: int) -> KVCache:
        """A cache of the model's kind and dtype with nothing in it."""
        config, weight = self.config, self.model.embed_tokens.weight
        place = (weight.dtype, weight.device)
        if config.attention_kind == "mla":
            widths = (config.kv_lora_rank, config.qk_rope_head_dim)
            return LatentCache(layers, batch_size, capacity, *widths, *place)
        heads = (config.num_key_value_heads, config.head_dim)
        if config.sliding_window is not None and config.sliding_window < capacity:
            return RollingKVCache(layers, batch_size, config.sliding_window, *heads, *place)
        return KVCache(layers, batch_size, capacity, *heads, *place)
