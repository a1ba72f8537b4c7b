"""From logits to the next token: filter out unlikely tokens, then draw.

The filters, in their order (that of Hugging Face `transformers`):

  repetition penalty  tokens already in the row: score / penalty if positive, score * penalty if negative
  temperature         score / temperature: below 1 sharper, above 1 flatter, 0 is greedy
  top-k               keep the k most likely tokens
  top-p               keep the most likely tokens that have probability p together (arXiv 1904.09751)
  min-p               keep tokens at least min_p times as likely as the most likely (arXiv 2407.01082)

    logits: (B, V) -> filtered_probs: (B, V), rows sum to 1 -> Sampler.pick: B token ids

Filtering and drawing are separate: speculative decoding compares the filtered probabilities of two models.

Reinforcement learning needs the log-probability of each drawn token, and computes it again, with a gradient,
as log softmax(logits / temperature). Trap: after a filter the two differ: what it keeps sums to 1 again.
"""

import hashlib
from dataclasses import dataclass

import torch

from utils.errors import UserError

BLOCK = 32  # random numbers that a row draws at once
COLDEST = 1e-30  # logits below 1e8 divided by it are still finite in fp32


@dataclass(frozen=True)
class SamplingParams:
    """The rules for choosing tokens. The defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 switches it off
    top_p: float = 1.0  # 1 switches it off
    min_p: float = 0.0  # 0 switches it off
    repetition_penalty: float = 1.0  # 1 switches it off
    max_new_tokens: int = 128
    seed: int = 0  # row b of a batch draws with row_seed(seed, b)

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

    def check_recorded(self) -> None:
        """Raise `UserError` if tokens are drawn from anything but softmax(logits / temperature)."""
        if self.temperature == 0:
            raise UserError("temperature=0 draws nothing: log-probabilities are recorded above 0 only")
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if (value := getattr(self, name)) != getattr(SamplingParams, name):
                raise UserError(
                    f"{name}={value}: with log-probabilities, only a temperature may shape the distribution; "
                    f"{name} makes tokens more likely than they are when the answer is scored; leave it out"
                )


def filtered_probs(logits, params: SamplingParams, seen=None):
    """Return the probabilities (B, V) of logits (B, V) after all filters, in fp32 or wider.

    `seen` (B, V) bool marks the tokens of each row so far; only the repetition penalty needs it.
    """
    scores = penalised(logits, params, seen)
    if params.temperature == 0:
        return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
    scores = scores if params.temperature == 1 else scores / max(params.temperature, COLDEST)
    if 0 < params.top_k < scores.shape[1]:
        least = scores.topk(params.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.sort(dim=1, descending=True)
        probs = ordered.softmax(dim=1)
        before = probs.cumsum(dim=1) - probs  # total of likelier tokens; 0 for the first, which always stays
        enough = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= params.top_p)
        scores = scores.masked_fill(enough, -torch.inf)
    if params.min_p > 0:
        probs = scores.softmax(dim=1)
        scores = scores.masked_fill(probs < params.min_p * probs.amax(dim=1, keepdim=True), -torch.inf)
    return scores.softmax(dim=1)


def penalised(logits, params: SamplingParams, seen=None):
    """Return the scores (B, V) after the repetition penalty, in fp32 or wider."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.repetition_penalty == 1:
        return scores
    lowered = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    return torch.where(seen, lowered, scores)


def draw(probs, uniforms):
    """Draw tokens (B,) from probs (B, V) with uniforms (B, 1) in (0, 1].

    The first token whose cumulative probability reaches the uniform number is taken. A token of probability 0
    is never drawn: its cumulative probability is that of the token before it.
    """
    cumulative = probs.cumsum(dim=1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:])[:, 0]


def row_seed(seed: int, *row: int) -> int:
    """Return the seed of one row of a batch, or of one sample of a prompt (`row` is then two numbers): `seed`
    itself for row 0, a hash of all numbers for the others.

    Trap: with seed + row, row 1 of seed 0 would repeat row 0 of seed 1.
    """
    if row == (0,):
        return seed
    numbers = " ".join(map(str, (seed, *row)))
    return int.from_bytes(hashlib.sha256(numbers.encode()).digest()[:8]) >> 2  # 62 bits


class Sampler:
    """Choose the tokens of one batch. Each row has its own random generator, so rows are independent.

    Random numbers come from the CPU, so they are the same on every `device`. The repetition penalty spares
    `stop_ids`: they end each past answer of a conversation, and answers would grow longer with every turn.
    `logprobs` (B,) are those of the tokens picked last. `must(row)`, if set, is the token that has to come
    next in a row, or None if the model is free.
    """

    must = None

    def __init__(
        self, params: SamplingParams, prompts: list[list[int]], vocab_size, device, stop_ids=(), seeds=None
    ):
        self.params, self.logprobs = params, None
        self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts if params.repetition_penalty != 1 else ()):
            # trained embeddings have ids beyond the vocabulary
            self.seen[row, [one for one in prompt if one < vocab_size and one not in stop_ids]] = True
        seeds = seeds or [row_seed(params.seed, row) for row in range(len(prompts))]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.picked, self.block = 0, None  # tokens of each row so far; random numbers (B, BLOCK)

    def pick(self, logits, rows: list[int] | None = None) -> list[int]:
        """Return the next token of each row for logits (B, V); `rows` are those left in the batch."""
        rows = torch.arange(len(self.generators)) if rows is None else torch.tensor(rows)
        seen = self.seen[rows.to(self.seen.device)] if self.params.repetition_penalty != 1 else None
        if self.params.temperature == 0:
            tokens = penalised(logits, self.params, seen).argmax(dim=1)
        else:
            probs = filtered_probs(logits, self.params, seen)
            tokens = draw(probs, self.uniforms(rows).to(probs))
        for place, row in enumerate(rows.tolist() if self.must else ()):
            tokens[place] = tokens[place] if (token := self.must(row)) is None else token
        if self.params.temperature > 0:
            self.logprobs = probs.gather(1, tokens[:, None])[:, 0].log()
        if seen is not None:
            self.seen[rows.to(tokens.device), tokens] = True
        return tokens.tolist()

    def uniforms(self, rows):
        """Return the next random number of each row, (B, 1) in (0, 1]. All rows are drawn by blocks."""
        place = self.picked % BLOCK
        if place == 0:
            drawn = [torch.rand(BLOCK, generator=generator) for generator in self.generators]
            self.block = 1 - torch.stack(drawn)
        self.picked += 1
        return self.block[rows, place, None]
