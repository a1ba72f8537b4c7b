"""Head for masked tokens: a transform of each hidden state, then one score for each token of the vocabulary.

    t = norm( act( dense(h) ) )          logits = t W^T + b          loss = sum of nll over the masked tokens

    h, t: (N, C)   dense: C -> C   W: (V, C), the token embedding (tied)   b: (V,)   ->   logits (N, V)

An encoder sees the whole row, and predicting a token that it can read would teach it nothing. So some are
hidden (load_data/masking.py), and labels[t] is the original token AT position t; a decoder's label is the
token after it. The transform lets hidden states differ from what W compares them with, and b learns how
frequent each token is.

Paper: Devlin et al., "BERT", arXiv 1810.04805. Names as in ModernBERT's `head`.
Trap: 85 % of the tokens have no label. The transform and the scores are computed for the others only, as
in `modules/cross_entropy.py`, which does the rest.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.cross_entropy import linear_cross_entropy
from modules.encoder.feed_forward import ACTIVATIONS
from modules.encoder.layer_norm import make_norm

WIDTH = 8  # channels to carry the bias: GPUs need products whose sizes are multiples of 8


class MaskedTokenHead(nn.Module):
    """The transform: `forward(hidden)`, (..., C) -> (..., C).

    Args:
        config: reads hidden_size, head_bias, hidden_act, and what `make_norm` reads.
    """

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.head_bias)
        self.norm, self.act = make_norm(config), ACTIVATIONS[config.hidden_act]

    def forward(self, hidden):
        """(..., C) -> (..., C)."""
        return self.norm(self.act(self.dense(hidden)))


def biased_cross_entropy(hidden, weight, bias, labels):
    """Cross-entropy of the logits hidden W^T + b. hidden (N, C), weight (V, C), bias and labels as above.

    A bias is the weight of a channel that is always 1, so `linear_cross_entropy` need not know of it. Returns
    the sum () and the nll (N,) of each token, without gradient.
    """
    ones = hidden.new_zeros(len(hidden), WIDTH)
    ones[:, 0] = 1
    wide = torch.cat([weight, F.pad(bias[:, None], (0, WIDTH - 1))], dim=1)  # (V, C + 8)
    return linear_cross_entropy(torch.cat([hidden, ones], dim=1), wide, labels)


def lesson():
    """Guess tokens with the bias alone: it learns their frequencies, which a model with context must beat."""
    torch.manual_seed(0)
    shares = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    labels = torch.multinomial(shares, 4000, replacement=True)
    hidden, weight = torch.zeros(4000, 16), torch.randn(5, 16) * 0.1  # a model that has seen nothing
    bias = torch.zeros(5, requires_grad=True)
    entropy = -(shares * shares.log()).sum()
    print(f"five tokens with shares {shares.tolist()}: guessing costs {torch.tensor(5.0).log():.3f} nats, "
          f"knowing the shares {entropy:.3f}")  # fmt: skip
    for step in range(61):
        loss = biased_cross_entropy(hidden, weight, bias, labels)[0] / len(labels)
        if step % 20 == 0:
            print(f"  step {step:2d}: loss {loss:.3f}, exp(b) as shares",
                  *[f"{share:.3f}" for share in bias.softmax(0).tolist()])  # fmt: skip
        (slope,) = torch.autograd.grad(loss, bias)
        with torch.no_grad():
            bias -= 3 * slope
    rows, masked, V = 32 * 256, 0.15, 4096
    print(f"logits of a batch of {rows} tokens, {V} in the vocabulary: {rows * V * 4 / 1e6:.0f} MB; "
          f"where there is a label: {masked * rows * V * 4 / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    lesson()
