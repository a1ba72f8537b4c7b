"""A frozen base that reads a question, and a selector that chooses the model to answer it."""

import torch
from torch import nn

from model.tinyseek import TinySeek
from modules.adapters.selector import Selector


class SelectingModel(nn.Module):
    """`forward(input_ids, ..)`: (B, T) -> logits (B, T, A) of the candidates at every token.

    The base runs without gradient. Only the logits at the end of a question matter.
    """

    def __init__(self, base: TinySeek, candidates: int, width: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.selector = Selector(base.config.hidden_size, candidates, width)

    def train(self, mode: bool = True):
        """Set the selector's mode; the base stays in evaluation mode, without dropout, as it is used."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, input_ids, position_ids=None, document_ids=None, padding_mask=None):
        """As in `TinySeek.forward`."""
        with torch.no_grad():
            hidden = self.base.model(input_ids, position_ids, document_ids, padding_mask).hidden  # (B, T, C)
        return self.selector(hidden)
