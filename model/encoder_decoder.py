"""T5 v1.1: an encoder reads a text in both directions, a decoder writes another and looks at what was read.

    each layer       h = h + attention(norm(h));   h = h + feed_forward(norm(h))
    of the decoder   between the two:   h = h + cross_attention(norm(h), s)

    s = norm(encoder(embed(source)))     h = norm(decoder(embed(written), s))     logits = lm_head(h)

Pre-norm with RMSNorm, gated GELU, no biases, positions only in the attention (modules/attention/relative.py).
The same weights give the same logits in Hugging Face's `T5ForConditionalGeneration` with `gated-gelu`, such
as T5 v1.1 and flan-T5.

    input_ids: (B, S), decoder_input_ids: (B, T)  ->  hidden (B, T, C)  ->  logits (B, T, V)

Paper: Raffel et al., arXiv 1910.10683; the gated form: Shazeer, arXiv 2002.05202; flan: arXiv 2210.11416.
"""

import torch
from torch import nn

from config.seq2seq import Seq2SeqConfig
from model.tinyseek import CausalLMOutput
from modules.attention.context import build_context
from modules.attention.relative import RelativeAttention, RelativeBias
from modules.attention.source import Source, SourceCache, source_bias
from modules.checkpointing import CheckpointedLayer
from modules.cross_entropy import linear_cross_entropy
from modules.encoder.feed_forward import FeedForward
from modules.norm import RMSNorm


class Layer(CheckpointedLayer):
    """One pre-norm layer of either stack; `layer` is its number, and `crosses` says whether it looks at a
    source. Each block's output is added to the residual stream (B, T, C)."""

    def __init__(self, config: Seq2SeqConfig, layer: int, crosses: bool):
        super().__init__()
        self.layer, norm = layer, (config.hidden_size, config.rms_norm_eps)
        self.self_attn, self.attention_norm = RelativeAttention(config), RMSNorm(*norm)
        self.cross_attn = RelativeAttention(config) if crosses else None
        self.cross_norm = RMSNorm(*norm) if crosses else None
        sizes, act = (config.hidden_size, config.intermediate_size), "gelu_new"
        self.mlp = FeedForward(*sizes, act, gated=True, bias=False, dropout=config.dropout)
        self.mlp_norm = RMSNorm(*norm)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden, bias, source: Source | None = None, cache: SourceCache | None = None):
        """hidden (B, T, C), bias (B or 1, H, T, S) of the attention to itself -> (B, T, C)."""
        x = self.attention_norm(hidden)
        keys, values = self.self_attn.keys_values(x)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        hidden = hidden + self.dropout(self.self_attn(x, keys, values, bias))
        if source is not None:
            x, both = self.cross_norm(hidden), source.keys_values[self.layer]
            hidden = hidden + self.dropout(self.cross_attn(x, *both, source.bias))
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))


class Stack(nn.Module):
    """The encoder or the decoder: layers that share one table of relative positions, and a final norm."""

    def __init__(self, config: Seq2SeqConfig, layers: int, decodes: bool):
        super().__init__()
        self.decodes = decodes
        self.relative_bias = RelativeBias(config, both_ways=not decodes)
        self.layers = nn.ModuleList(Layer(config, number, decodes) for number in range(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden, padding_mask=None, source=None, cache=None, new_tokens=None):
        """hidden (B, T, C) -> (B, T, C). Compute bias and mask once, then run all layers."""
        T, device = hidden.shape[1], hidden.device
        query_index = key_index = torch.arange(T, device=device)[None]
        if cache is not None:
            cache.begin(T, new_tokens)
            query_index, key_index = cache.query_index, cache.key_index
        context = build_context(T, device, causal=self.decodes, padding_mask=padding_mask, cache=cache)
        bias = self.relative_bias(query_index, key_index)  # (B or 1, H, T, S)
        mask = context.bias(bias.dtype)
        bias = bias if mask is None else bias + mask
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, bias, source, cache)
        if cache is not None:
            cache.advance()
        return self.dropout(self.norm(hidden))


class EncoderDecoder(nn.Module):
    """T5 v1.1 and flan-T5."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config, config.num_hidden_layers, decodes=False)
        self.decoder = Stack(config, config.num_decoder_layers, decodes=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()
        self.scale = 1.0
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if config.scale_decoder_outputs:
            self.scale = config.hidden_size**-0.5

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from N(0, initializer_range), those of queries with 1/sqrt(D) of that.

        Nothing else divides the scores by sqrt(D). With large scores the softmax picks one key, and its
        gradient vanishes.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                narrow = self.config.head_dim**-0.5 if "q_proj" in name else 1.0
                parameter.normal_(0.0, self.config.initializer_range * narrow)

    def forward(
        self, input_ids, labels=None, *, padding_mask=None, decoder_input_ids, decoder_padding_mask=None
    ) -> CausalLMOutput:
        """Read `input_ids` (B, S) and predict what follows each of `decoder_input_ids` (B, T).

        Args:
            labels: (B, T), already shifted: labels[b, t] follows decoder_input_ids[b, t], or -100 for none.
                With labels, the output holds the loss and no logits.
            padding_mask, decoder_padding_mask: (B, S) and (B, T), True for real tokens.
        """
        source = self.read(input_ids, padding_mask)
        hidden = self.decoder(self.embed_tokens(decoder_input_ids), decoder_padding_mask, source)
        output = CausalLMOutput(hidden)
        if labels is None:
            output.logits = self.logits(hidden)
        else:
            rows = (hidden * self.scale).flatten(0, 1)  # (B*T, C)
            output.loss_sum, output.nll = linear_cross_entropy(rows, self.lm_head.weight, labels.flatten())
        return output

    def encode(self, input_ids, padding_mask=None):
        """input_ids (B, S) -> hidden states (B, S, C), zero at padding."""
        hidden = self.encoder(self.embed_tokens(input_ids), padding_mask)
        return hidden if padding_mask is None else hidden.masked_fill(~padding_mask.bool()[:, :, None], 0.0)

    def read(self, input_ids, padding_mask=None) -> Source:
        """Encode `input_ids` (B, S) and compute what every decoder layer looks at."""
        hidden = self.encode(input_ids, padding_mask)
        both = [layer.cross_attn.keys_values(hidden) for layer in self.decoder.layers]
        return Source(both, source_bias(padding_mask, hidden.dtype))

    def logits(self, hidden):
        """(B, T, C) -> (B, T, V)."""
        return self.lm_head(hidden * self.scale)

    def reading(self, source_ids: list[list[int]]) -> "Reading":
        """Read these sources, without dropout or gradients, and return a model that writes about them."""
        return Reading(self, source_ids)


class Reading(nn.Module):
    """A decoder with its sources, which `Generator` takes in place of a `TinySeek`: row b writes about
    source b. The encoder runs once, here."""

    def __init__(self, model: EncoderDecoder, source_ids: list[list[int]]):
        super().__init__()
        self.model, self.config, training = model, model.config, model.training
        device, width = model.embed_tokens.weight.device, max(1, *map(len, source_ids))
        ids = [ids + [0] * (width - len(ids)) for ids in source_ids]  # (B, S)
        mask = [[True] * len(ids) + [False] * (width - len(ids)) for ids in source_ids]
        self.eval()
        with torch.no_grad():
            self.source = model.read(torch.tensor(ids, device=device), torch.tensor(mask, device=device))
        self.train(training)

    def make_cache(self, batch_size: int, capacity: int) -> SourceCache:
        """Return an empty cache for one row of `capacity` tokens per source."""
        if batch_size != len(self.source.keys_values[0][0]):
            raise ValueError(f"{batch_size} rows to write for {len(self.source.keys_values[0][0])} sources")
        return SourceCache(self.source, capacity)

    def forward(self, input_ids, *, cache: SourceCache, new_tokens=None, last_only=False) -> CausalLMOutput:
        """input_ids (B, T), of which `new_tokens` are real (None: all) -> logits (B, T, V), or (B, 1, V) of
        each row's last real token with `last_only`."""
        model, T = self.model, input_ids.shape[1]
        hidden = model.decoder(model.embed_tokens(input_ids), None, cache.source, cache, new_tokens)
        if last_only:
            ends = torch.tensor([T] * len(hidden) if new_tokens is None else new_tokens)
            hidden = hidden[torch.arange(len(hidden)), ends - 1, None]  # (B, 1, C)
        return CausalLMOutput(hidden, logits=model.logits(hidden))
