"""Multi-token prediction (MTP): a second head that predicts the token after the next.

The output head predicts token t+1 from the trunk's hidden state h_t. MTP predicts token t+2 with the same
output head from another hidden state:

  parallel     h'_t = norm(h_t + silu(W h_t))                                    one C x C matrix
  sequential   h'_t = norm(layer(M [norm(embed(token t+1)) ; norm(h_t)]))        one more decoder layer

The parallel head must average over every possible token t+1; the sequential head is told which it was. In
training, both make the trunk plan ahead. At inference they draft tokens that the trunk verifies several at a
time (inference/generation/speculative.py): decoding is faster and its results do not change.

    hidden: (B, T, C), embeddings of the next tokens: (B, T, C)  ->  hidden for token t+2: (B, T, C)

Trap: hidden state, embedding and label must belong together. For the text `the cat sat down .` they are:

    input_ids    the    cat    sat    down       labels     cat    sat    down   .
    next_ids     cat    sat    down   0          mtp_labels sat    down   .      -100

    column 0:  hidden of `the`,  embedding of `cat`,  label `sat`

Papers: Gloeckle et al., arXiv 2404.19737 (parallel heads, each a decoder layer); Medusa, arXiv 2401.10774 (a
head of one matrix, as here); DeepSeek-V3, arXiv 2412.19437 (sequential). DeepSeek divides the loss by T; here
it is divided by the supervised tokens of the step, like the other losses.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from config.model import ModelConfig
from modules.norm import RMSNorm


class ParallelMTP(nn.Module):
    """A head that predicts token t+2 from h_t alone: `forward(hidden)`, (B, T, C) -> (B, T, C).

    `hidden` has passed the trunk's final norm, and the result passes a norm of its own, so the shared output
    head gets vectors of the size that it is trained on.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden, embeddings=None, context=None, rotary=None, cache=None):
        """hidden (B, T, C) -> (B, T, C) and no routing. The other arguments are those of `SequentialMTP`."""
        return self.norm(hidden + F.silu(self.proj(hidden))), None


class SequentialMTP(nn.Module):
    """DeepSeek-V3's block, which predicts token t+2 from h_t and token t+1.

    The embedding table and the output head are the trunk's; the model applies both. As in Hugging Face's
    `MtpModel`, the trunk's hidden state arrives after the trunk's final norm, is normalised once more with
    another gain, and comes second, after the embedding. This is the order of the released weights, the
    opposite of the paper's formula. The result has passed a norm of its own (`shared_head.norm` there), so it
    can replace `hidden` when a third token is drafted.

    Positions count from 0, although each embedded token is one further: rotary attention sees only distances.

    Args:
        config: reads hidden_size and rms_norm_eps.
        layer: a decoder layer, `layer(hidden, context, rotary, cache) -> (hidden, routing)`.
    """

    def __init__(self, config: ModelConfig, layer: nn.Module):
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = layer
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden, embeddings, context, rotary, cache=None):
        """hidden (B, T, C), embeddings (B, T, C) of the next tokens -> (B, T, C), and the layer's routing.

        context, rotary and cache are passed to the layer; its cache is separate and one layer deep.
        """
        both = torch.cat([self.enorm(embeddings), self.hnorm(hidden)], dim=-1)  # (B, T, 2C)
        hidden, routing = self.layer(self.eh_proj(both), context, rotary, cache)
        return self.norm(hidden), routing


def next_ids(input_ids):
    """input_ids (B, T) -> (B, T): column t holds the token of column t+1.

    The token after the last column is unknown; it is set to 0, but any id would do. Its label is -100 and no
    other column attends to it, so it never counts. The same holds where the next token belongs to another
    document.
    """
    return F.pad(input_ids[:, 1:], (0, 1), value=0)


def mtp_labels(labels, document_ids=None):
    """labels (B, T), where labels[b, t] is token t+1 -> (B, T), where column t is token t+2.

    The last column is -100 (no loss). With document_ids (B, T), so is the last token of each document: the
    token embedded there belongs to the next document.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    if document_ids is None:
        return shifted
    border = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1))  # the last column is -100 already
    return shifted.masked_fill(border, -100)


class NoAttention(nn.Module):
    """A decoder layer without attention, for the lesson: (B, T, C) -> (B, T, C), None."""

    def __init__(self, size: int):
        super().__init__()
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, hidden, context, rotary, cache=None):
        """hidden (B, T, C); the other arguments are ignored."""
        return hidden + self.down(F.silu(self.up(hidden))), None


def lesson():
    """Train both heads on text where each token allows four next ones, and compare what they can know."""
    torch.manual_seed(0)
    V, C = 32, 32
    chain = torch.randint(V, (160, 1))
    for _ in range(16):  # the next token is 5 times this one plus 0, 1, 2 or 3
        chain = torch.cat([chain, (5 * chain[:, -1:] + torch.randint(4, (160, 1))) % V], dim=1)
    ids, labels = chain[:, :-1], chain[:, 1:]  # (B, T)
    config, table = ModelConfig(hidden_size=C), torch.randn(V, C)
    hidden, following = table[ids], table[next_ids(ids)]  # (B, T, C); hidden: token t itself
    print(f"MTP: {V} tokens, four may follow each; guessing has a loss of {math.log(V):.2f}")
    for choices, mtp in (16, ParallelMTP(config)), (4, SequentialMTP(config, NoAttention(C))):
        head = nn.Linear(C, V)
        optimizer = torch.optim.AdamW([*mtp.parameters(), *head.parameters()], lr=2e-2)
        for _ in range(60):
            second, _ = mtp(hidden, following, None, None)
            losses = F.cross_entropy(head(second).mT, mtp_labels(labels), reduction="none")[:, :-1]
            optimizer.zero_grad(), losses[:128].mean().backward(), optimizer.step()
        name, loss = type(mtp).__name__, losses[128:].mean()  # on held-out rows
        print(f"  {name:13s} loss {loss:.2f}; {choices:2d} equally likely choices: {math.log(choices):.2f}")
    for rate in (0.5, 0.7, 0.9):  # the probability that a draft is accepted if those before it were
        gains = [f"{g}: {(1 - rate ** (g + 1)) / (1 - rate):.2f}" for g in (1, 2, 4)]
        print(f"  {rate:.0%} accepted: tokens per trunk forward, by number of drafts ", "  ".join(gains))


if __name__ == "__main__":
    lesson()
