"""A reader of texts with a tiny random encoder over bytes."""

import torch
import torch.nn.functional as F
from torch import nn

from config.schema import RunConfig
from inference.index.reader import TextReader
from tests.inference.tools import byte_tokenizer

WIDTH = 16


class Mean(nn.Module):
    """Ids to the mean of their vectors, after something that depends on the order."""

    def __init__(self, vocab_size: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, ids, padding_mask=None):
        one = self.embed(ids)
        both = torch.cat([one, one.roll(1, dims=1)], dim=-1)
        both[:, 0, WIDTH:] = 0
        hidden = self.mix(both).tanh() * padding_mask[..., None]
        return F.normalize(hidden.sum(1), dim=-1)


def tiny_reader(seed=0, document_length=65) -> TextReader:
    """A reader whose tokens are bytes. A passage may have `document_length` - 1 of them."""
    config = RunConfig()
    config.embed.document_length, config.embed.query_length = document_length, 33
    tokenizer = byte_tokenizer()
    return TextReader(Mean(tokenizer.vocab_size, seed).eval(), tokenizer, config)
