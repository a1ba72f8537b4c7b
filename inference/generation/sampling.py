"""From logits to the next token: cut the unlikely away, then draw.

The filters, in the order in which they act (the order of Hugging Face `transformers`):

  repetition penalty  tokens already in the row: score / penalty if positive, score * penalty if negative
  temperature         score / temperature: below 1 sharper, above 1 flatter, 0 always takes the likeliest
  top-k               keep the k likeliest
  top-p               keep the likeliest until they have probability p together (nucleus, arXiv 1904.09751)
  min-p               keep what is at least min_p times as likely as the likeliest (arXiv 2407.01082)

    logits: (B, V) -> filtered_probs: (B, V), rows sum to 1 -> Sampler.pick: B token ids

Filtering and drawing are apart: speculative decoding compares the filtered probabilities of two models.
"""

from dataclasses import dataclass

import torch

from utils.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and how many. The defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 switches it off
    top_p: float = 1.0  # 1 switches it off
    min_p: float = 0.0  # 0 switches it off
    repetition_penalty: float = 1.0  # 1 switches it off
    max_new_tokens: int = 128
    seed: int = 0  # row b of a batch draws with seed + b

    def __post_init__(self):
        rules = {  # written so that NaN fails too
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            "top_k": (self.top_k >= 0, "0 (off) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**62, "0 or above, below 2^62"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"{name}={getattr(self, name)} must be {rule}")


def filtered_probs(logits, params: SamplingParams, seen=None):
    """logits (B, V) -> probabilities (B, V) after all filters.

    `seen` (B, V) bool, the tokens of each row so far, is needed for the repetition penalty only. Computed
    in fp32, in fp64 for fp64 logits.
    """
    scores = penalised(logits, params, seen)
    if params.temperature == 0:
        return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
    scores = scores / params.temperature
    if 0 < params.top_k < scores.shape[1]:
        least = scores.topk(params.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.sort(dim=1, descending=True)
        probs = ordered.softmax(dim=1)
        before = probs.cumsum(dim=1) - probs  # of the likelier ones; 0 for the first, which so always stays
        enough = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= params.top_p)
        scores = scores.masked_fill(enough, -torch.inf)
    if params.min_p > 0:
        probs = scores.softmax(dim=1)
        scores = scores.masked_fill(probs < params.min_p * probs.amax(dim=1, keepdim=True), -torch.inf)
    return scores.softmax(dim=1)


def penalised(logits, params: SamplingParams, seen=None):
    """The scores (B, V) after the repetition penalty, in fp32 or wider."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.repetition_penalty == 1:
        return scores
    lowered = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    return torch.where(seen, lowered, scores)


def draw(probs, uniforms):
    """probs (B, V), uniforms (B, 1) in (0, 1] -> tokens (B,).

    The first token at which the cumulated probability reaches the uniform number: a token of probability 0 is
    never drawn, as it reaches nothing that the token before it did not.
    """
    cumulated = probs.cumsum(dim=1)
    return torch.searchsorted(cumulated, uniforms * cumulated[:, -1:])[:, 0]


class Sampler:
    """Chooses the tokens of one batch. Each row has a random generator of its own, so that what it draws does
    not depend on the rows beside it.

    Args:
        prompts: the ids of each row so far.
        device: of the logits. The random numbers come from the CPU: they are the same for every device.
    """

    def __init__(self, params: SamplingParams, prompts: list[list[int]], vocab_size: int, device):
        self.params, self.seen = params, None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):  # learned embeddings have ids beyond the vocabulary
                self.seen[row, [token for token in prompt if token < vocab_size]] = True
        self.generators = [torch.Generator().manual_seed(params.seed + row) for row in range(len(prompts))]

    def pick(self, logits) -> list[int]:
        """The next token of each row. logits: (B, V)."""
        if self.params.temperature == 0:
            tokens = penalised(logits, self.params, self.seen).argmax(dim=1)
        else:
            probs = filtered_probs(logits, self.params, self.seen)
            uniforms = [1 - torch.rand(1, generator=generator) for generator in self.generators]  # (0, 1]
            tokens = draw(probs, torch.stack(uniforms).to(probs))
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens.tolist()
