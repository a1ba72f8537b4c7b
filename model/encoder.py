"""The encoder, which reads a text in both directions: BERT, ModernBERT, and what lies between.

    h = norm(embed(ids) + position vector + vector of the token's type)         the last two where configured
    post-norm (BERT)        for each layer:  h = norm(h + attention(h));   h = norm(h + feed_forward(h))
    pre-norm (ModernBERT)   for each layer:  h = h + attention(norm(h));   h = h + feed_forward(norm(h))
                            and h = norm(h) after the last

Post-norm passes the residual stream itself through each norm, and needs a warm-up (arXiv 2002.04745). In
pre-norm order the first layer has no norm before its attention: that of the embedding comes right before it.

The same weights give the same hidden states and logits in Hugging Face's `BertForMaskedLM` and
`ModernBertForMaskedLM`; names are translated, and ModernBERT stores q, k and v in one matrix.

    input_ids: (B, T) -> hidden (B, T, C) -> logits (B, T, V)

Papers: arXiv 1810.04805 (BERT), 2412.13663 (ModernBERT).
"""

import torch
import torch.nn.functional as F
from torch import nn

from config.encoder import EncoderConfig
from model.tinyseek import CausalLMOutput
from modules.attention.context import layer_contexts
from modules.attention.grouped_query import GroupedQueryAttention
from modules.checkpointing import CheckpointedLayer
from modules.encoder.feed_forward import FeedForward
from modules.encoder.layer_norm import make_norm
from modules.encoder.mlm_head import MaskedTokenHead, biased_cross_entropy
from modules.rope import RotaryEmbedding


class EncoderLayer(CheckpointedLayer):
    """Attention, then feed-forward: with norms (before or after), added to the residual (B, T, C)."""

    def __init__(self, config: EncoderConfig, layer: int):
        super().__init__()
        self.post = config.norm_order == "post"
        self.self_attn = GroupedQueryAttention(config, layer)
        self.attention_norm = make_norm(config) if self.post or layer else nn.Identity()
        sizes = (config.hidden_size, config.intermediate_size)
        self.mlp = FeedForward(*sizes, config.hidden_act, config.gated, config.mlp_bias)
        self.mlp_norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden, context, rotary, past=None):
        """(B, T, C) -> (B, T, C)."""
        if self.post:
            hidden = self.attention_norm(hidden + self.dropout(self.self_attn(hidden, context, rotary)))
            return self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))
        hidden = hidden + self.dropout(self.self_attn(self.attention_norm(hidden), context, rotary))
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))


class Encoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        C, absolute = config.hidden_size, config.position_embedding_type == "absolute"
        self.embed_tokens = nn.Embedding(config.vocab_size, C)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, C) if absolute else None
        self.embed_token_types = nn.Embedding(config.type_vocab_size, C) if config.type_vocab_size else None
        self.embed_norm = make_norm(config)
        self.layers = nn.ModuleList(EncoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = make_norm(config) if config.norm_order == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        rotary = [RotaryEmbedding(config.head_dim, theta)
                  for theta in (config.global_rope_theta, config.local_rope_theta)]  # fmt: skip
        self.rotary_emb = None if absolute else nn.ModuleList(rotary)
        init_weights(self, config.initializer_range)

    def forward(
        self, input_ids, *, token_type_ids=None, position_ids=None, document_ids=None, padding_mask=None
    ):
        """input_ids (B, T) -> hidden (B, T, C), zeros at padding.

        Args:
            token_type_ids: (B, T), the kind of segment of each token; by default 0.
            position_ids: (B, T); by default 0, 1, 2, ... from the row's start, padding counted too, or for
                absolute positions from the start of each document.
            document_ids: (B, T) numbers of the texts packed into one row, which do not see each other.
            padding_mask: (B, T), True for real tokens.
        """
        windows = [self.config.layer_window(n) for n in range(len(self.layers))]
        contexts = layer_contexts(
            windows, input_ids.shape[1], input_ids.device, causal=False, position_ids=position_ids,
            document_ids=document_ids, padding_mask=padding_mask,
        )  # fmt: skip
        rotary = dict.fromkeys(contexts)
        if self.rotary_emb is not None:  # the first for layers that see all, the second for local ones
            rotary = {w: self.rotary_emb[0 if w is None else 1](contexts[w].positions) for w in contexts}
        hidden = self.embed(input_ids, token_type_ids, position_ids, document_ids)
        for layer, window in zip(self.layers, windows):
            hidden = layer(hidden, contexts[window], rotary[window])
        hidden = self.norm(hidden)
        return hidden if padding_mask is None else hidden.masked_fill(~padding_mask.bool()[..., None], 0)

    def embed(self, input_ids, token_type_ids, position_ids, document_ids):
        """input_ids (B, T), the others (B, T) or None -> hidden (B, T, C) before the first layer."""
        hidden = self.embed_tokens(input_ids)
        if self.embed_token_types is not None:
            types = self.embed_token_types
            hidden = hidden + (types.weight[0] if token_type_ids is None else types(token_type_ids))
        elif token_type_ids is not None:
            raise ValueError("token_type_ids need encoder.type_vocab_size of at least 1: this model has none")
        if self.embed_positions is not None:
            if position_ids is None:
                position_ids = positions_of(input_ids, document_ids)
            self.check_room(position_ids)
            hidden = hidden + self.embed_positions(position_ids)
        # Under autocast RMSNorm returns bf16, which is for products: the residual stream stays as it was.
        return self.dropout(self.embed_norm(hidden).to(hidden.dtype))

    def check_room(self, position_ids):
        """Raise `ValueError` if a position has no vector. GPUs would stop the whole process instead."""
        needed, limit = int(position_ids.max()) + 1, self.config.max_position_embeddings
        if needed > limit:
            raise ValueError(
                f"a text of {needed} tokens: the model has vectors for {limit} positions "
                "(encoder.max_position_embeddings); cut the text"
            )


class MaskedLM(nn.Module):
    """An encoder that predicts hidden tokens. Its output has no `routings`, since it has no experts."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.model = Encoder(config)
        self.head = MaskedTokenHead(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.lm_head.weight = self.model.embed_tokens.weight
        init_weights(self, config.initializer_range)

    def forward(
        self, input_ids, labels=None, *, token_type_ids=None, position_ids=None, document_ids=None,
        padding_mask=None,
    ) -> CausalLMOutput:  # fmt: skip
        """Return logits (B, T, V), or the loss if `labels` are given: labels[b, t] (B, T) is the original
        token at t, or -100 for none. The other arguments are described at `Encoder.forward`."""
        hidden = self.model(
            input_ids, token_type_ids=token_type_ids, position_ids=position_ids, document_ids=document_ids,
            padding_mask=padding_mask,
        )  # fmt: skip
        output = CausalLMOutput(hidden)
        if labels is None:
            output.logits = self.logits(hidden)
            return output
        keep = labels != -100
        rows = self.head(hidden[keep])  # (N, C)
        output.loss_sum, output.nll = biased_cross_entropy(rows, *self.lm_head.parameters(), labels[keep])
        return output

    def logits(self, hidden):
        """(..., C) -> (..., V)."""
        return self.lm_head(self.head(hidden))


def positions_of(input_ids, document_ids=None):
    """Return positions, counted from the start of the row, or of each document, whose tokens are contiguous.

    input_ids and document_ids (B, T) -> (1 or B, T).
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
    if document_ids is None:
        return index
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return index - (index * starts).cummax(dim=1).values


@torch.no_grad()
def init_weights(module: nn.Module, deviation: float) -> None:
    """Draw every matrix from N(0, deviation); biases become zero, gains stay one."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, deviation)
        elif name.endswith("bias"):
            parameter.zero_()
