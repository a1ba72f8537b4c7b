"""An embedding model: an encoder or a decoder whose hidden states become one vector per text.

    input_ids (B, T) -> hidden (B, T, C) -> (B, C), unit vectors; zeros for a row of padding only

The parameters are those of the body, under `body.`: the encoder of model/encoder.py, or the decoder of
model/tinyseek.py without its output head. In a decoder only the last token has seen the whole text, so it is
the one to take (`pooling` "last"). The pooling "attention" adds one vector, `query`.
"""

import torch
from torch import nn

from config.encoder import EncoderConfig
from config.model import ModelConfig
from config.objectives import EmbedConfig
from model.encoder import Encoder
from model.tinyseek import TinySeek
from modules.pooling import pool

ROWS = 32  # that run together


class Embedder(nn.Module):
    """`forward(input_ids, padding_mask)`: (B, T) -> (B, C), in fp32 or wider."""

    def __init__(self, body: nn.Module, pooling: str, config: EncoderConfig | ModelConfig):
        super().__init__()
        self.body, self.pooling, self.config = body, pooling, config
        # Zeros weigh all tokens alike: training starts from the mean.
        self.query = nn.Parameter(torch.zeros(config.hidden_size)) if pooling == "attention" else None

    @classmethod
    def from_config(cls, embed: EmbedConfig, config: EncoderConfig | ModelConfig) -> "Embedder":
        """Return the model that `embed.base` and the settings of its body describe, with random weights."""
        body = Encoder(config) if embed.base == "encoder" else TinySeek(config).model
        return cls(body, embed.pooling, config)

    def forward(self, input_ids, padding_mask=None):
        """Embed each row; `padding_mask` (B, T) is True for real tokens, by default everywhere."""
        if padding_mask is None:
            padding_mask = torch.ones_like(input_ids, dtype=torch.bool)
        hidden = self.body(input_ids, padding_mask=padding_mask)
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden.hidden  # of a decoder
        return pool(hidden, padding_mask, self.pooling, self.query)


def embed_by_length(model, input_ids, padding_mask):
    """Return what `model(input_ids, padding_mask)` does, from batches of rows with similar lengths: these
    differ so much that padding would cost more than the texts. (B, T) -> (B, C)."""
    order = padding_mask.sum(1).argsort(stable=True)
    parts = []
    for rows in order.split(ROWS):
        mask = padding_mask[rows]
        width = mask.shape[1] - int(mask.any(0).flip(0).int().argmax()) if mask.any() else 1
        parts.append(model(input_ids[rows, :width], mask[:, :width]))
    return torch.cat(parts)[order.argsort()]
