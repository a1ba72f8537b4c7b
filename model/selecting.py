"""A frozen base that reads, and a selector on top that chooses who answers (modules/adapters/selector.py)."""

import torch
from torch import nn

from model.tinyseek import TinySeek
from modules.adapters.selector import Selector


class SelectingModel(nn.Module):
    """`forward(input_ids, ..)`: (B, T) -> logits (B, T, A) of the candidates at every token.

    The base is frozen and reads without gradient; what matters are the logits where a question ends.
    """

    def __init__(self, base: TinySeek, candidates: int, width: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.selector = Selector(base.config.hidden_size, candidates, width)

    def train(self, mode: bool = True):
        """The base always reads as it will in use, without dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, input_ids, position_ids=None, document_ids=None, padding_mask=None):
        """As in `TinySeek.forward`."""
        with torch.no_grad():
            hidden = self.base.model(input_ids, position_ids, document_ids, padding_mask).hidden  # (B, T, C)
        return self.selector(hidden)
