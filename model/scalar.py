"""A decoder with a head of one output: a number for every token, as a reward model and a critic need.

    scores = head(decoder(ids))      input_ids (B, T) -> (B, T)

The reward of an answer is the score of its last token; a critic reads the scores of all. The decoder's
parameters are named as in `TinySeek`, `model.*`, and the head `score.weight` as in Hugging Face's
`...ForSequenceClassification`. The head starts at zero, so that every score does. It has no bias: rewards
that are compared would not train one.
"""

import torch
from torch import nn

from config.model import ModelConfig
from model.tinyseek import TinySeek


class ScalarModel(nn.Module):
    """`forward(input_ids, ..)`: (B, T) -> scores (B, T), in fp32 or wider."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = TinySeek(config).model
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    @classmethod
    def from_policy(cls, policy: TinySeek) -> "ScalarModel":
        """Return a model with a copy of the decoder of `policy`, without adapters, on its device."""
        scalar, weights = cls(policy.config).to(policy.lm_head.weight), policy.model.state_dict()
        scalar.model.load_state_dict({name: weights[name] for name in scalar.model.state_dict()})
        return scalar

    def forward(self, input_ids, position_ids=None, document_ids=None, padding_mask=None) -> torch.Tensor:
        """As in `TinySeek.forward`."""
        hidden = self.model(input_ids, position_ids, document_ids, padding_mask).hidden  # (B, T, C)
        return (hidden * self.score.weight).sum(-1)  # not a linear layer: bf16 would round the scores
