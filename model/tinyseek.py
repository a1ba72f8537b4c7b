"""The TinySeek decoder: token embedding, a stack of pre-norm layers, a final norm, an output head.

    h = embed(ids)
    for each layer:   h = h + attention(norm(h));   h = h + feed_forward(norm(h))
    logits = lm_head(norm(h))

Pre-norm: each block reads a normalised copy and adds its answer to the residual stream, so gradients pass the
stack unchanged (Xiong et al., arXiv 2002.04745). A dense TinySeek is exactly a Hugging Face
`Qwen3ForCausalLM`: the same parameter names, the same numbers.

    input_ids: (B, T) -> hidden (B, T, C) -> logits (B, T, V)
"""

from dataclasses import dataclass

import torch
from torch import nn

from config.schema import ModelConfig
from modules.attention import GroupedQueryAttention
from modules.attention_context import build_context
from modules.cache import KVCache, RollingKVCache
from modules.cross_entropy import linear_cross_entropy, soft_cap
from modules.mlp import SwiGLU
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding


@dataclass
class CausalLMOutput:
    """What a forward gives: logits (B, T, V), or, where labels were given, the loss instead.

    Attributes:
        logits: (B, T, V) or None.
        loss_sum: (), cross-entropy summed over the supervised tokens; divide by their number per step.
        nll: (N,), cross-entropy of each supervised token, without gradient.
    """

    logits: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    nll: torch.Tensor | None = None


class DecoderLayer(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = GroupedQueryAttention(config, layer)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden, context, rotary, cache=None):
        """(B, T, C) -> (B, T, C)."""
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), context, rotary, cache))
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))


class Decoder(nn.Module):
    """Embedding, layers and final norm: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings,
            config.rope_interleaved,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, input_ids, position_ids=None, document_ids=None, padding_mask=None, cache=None, new_tokens=None
    ):
        """See `TinySeek.forward`. Positions, masks and rotary tables are made here, once for all layers."""
        tokens = input_ids.shape[1]
        if cache is not None:
            cache.begin(tokens, new_tokens)
        context = build_context(
            tokens, input_ids.device, window=self.config.sliding_window, position_ids=position_ids,
            document_ids=document_ids, padding_mask=padding_mask, cache=cache,
        )  # fmt: skip
        hidden = self.dropout(self.embed_tokens(input_ids))  # (B, T, C)
        rotary = self.rotary_emb(context.positions)
        for layer in self.layers:
            hidden = layer(hidden, context, rotary, cache)
        if cache is not None:
            cache.advance()
        return self.norm(hidden)


class TinySeek(nn.Module):
    """The language model. Parameters are named as in `Qwen3ForCausalLM`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
            if self.config.zero_init_residual and name.endswith(("o_proj.weight", "down_proj.weight")):
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
    ) -> CausalLMOutput:
        """One forward.

        Args:
            input_ids: (B, T).
            labels: (B, T); labels[b, t] is the token that follows input_ids[b, t], or -100 for none. The
                shift happened in the data set; there is none here. With labels the output holds the loss and
                no logits.
            position_ids: (B, T) places for rotary embeddings; default 0, 1, 2, ..
            document_ids: (B, T) texts packed into one row, which then do not see each other.
            padding_mask: (B, T), True for real tokens.
            cache: past keys and values; grows by the new tokens.
            new_tokens: real tokens per row, where the rest of a row's T columns is padding (with a cache).
            last_only: logits of each row's last token only, (B, 1, V): all that generation needs.
                With `new_tokens` the last real one (a row with 0 of them gets a logit without meaning);
                `padding_mask` is not looked at.
        """
        hidden = self.model(input_ids, position_ids, document_ids, padding_mask, cache, new_tokens)
        if labels is not None:
            loss_sum, nll = linear_cross_entropy(
                hidden.flatten(0, 1),  # (B*T, C)
                self.lm_head.weight,
                labels.flatten(),  # (B*T,)
                self.config.final_logit_softcapping,
            )
            return CausalLMOutput(loss_sum=loss_sum, nll=nll)
        if last_only and new_tokens is not None:
            last = torch.tensor(new_tokens, device=hidden.device) - 1
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last, None]  # (B, 1, C)
        elif last_only:
            hidden = hidden[:, -1:]
        return CausalLMOutput(logits=soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping))

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `batch_size` rows of at most `capacity` tokens, in the model's dtype."""
        config, weight = self.config, self.model.embed_tokens.weight
        shape = (config.num_key_value_heads, config.head_dim, weight.dtype, weight.device)
        if config.sliding_window is not None and config.sliding_window < capacity:
            return RollingKVCache(config.num_hidden_layers, batch_size, config.sliding_window, *shape)
        return KVCache(config.num_hidden_layers, batch_size, capacity, *shape)
