"""Self-speculative decoding: the MTP head drafts, the trunk checks all drafts in one forward.

A forward over a few tokens costs little more than one over a single token: as many calls, and every weight is
read once (4 layers on a CPU: 1.25 times as long for two, 1.3 times for five). So each round guesses g tokens
with the small head, and lets the trunk read them all at once:

    text ... x            x is written, but not yet in the cache
    draft                 d1 .. dg, one by one: the head reads the trunk's last hidden state and x, then its
                          own hidden state and d1, ..
    verify   x d1 .. dg   the trunk's probabilities p0 .. pg, each for the token after
    accept                d1 .. dk, up to the first rejection, and one token more from the trunk
    crop                  both caches forget what was not accepted

so each round writes 1 to g + 1 tokens. The text has exactly the distribution that the trunk alone would give
(Leviathan et al., arXiv 2211.17192), whatever the drafts are worth. For a draft d that was drawn from q:

    accept with probability min(1, p(d) / q(d)); at the first rejection draw from max(p - q, 0), normalised

A token is then written with probability min(p, q) by acceptance, and the rest, p - min(p, q), by the second
draw. Acceptance is sum min(p, q) on average. p and q are what is left after all the filters of
inference/generation/sampling.py. With temperature 0 both have one token of probability 1, and the same rule
accepts while the draft is the trunk's likeliest token: greedy decoding, token for token.

The sequential head keeps a cache of its own. Its column t holds token t+1 and the trunk's hidden state of
token t, once it is known; while drafting further, the head's own hidden state takes its place, so those
columns are forgotten after each round and written again from the trunk's.
"""

from collections.abc import Callable, Collection

import torch

from inference.generation.generator import Generator, few_threads
from inference.generation.sampling import Sampler, SamplingParams, draw, filtered_probs
from model.caches import make_cache, make_draft_cache
from modules.attention.context import build_context
from utils.errors import UserError

LONGEST = 15  # a rolling cache takes back 16 tokens


class SpeculativeGenerator(Generator):
    """Continues one row with drafts, several rows as `Generator` does.

    Args:
        model: a `TinySeek` with an MTP head.
        start_id: where an empty prompt starts.
        draft_length: g, the most tokens drafted at a time; a parallel head drafts one.
        fast: both go through `FastDecoder` where that supports the model; False: never.

    Attributes:
        drafted, accepted: how many tokens, over all calls. A draft behind a rejected one is not accepted.
    """

    def __init__(self, model, start_id: int = 0, draft_length: int = 1, fast: bool = True):
        super().__init__(model, start_id, fast)
        kind = model.config.mtp
        if kind == "none":
            raise UserError("this model has no head that drafts: train one with model.mtp=sequential")
        longest = LONGEST if kind == "sequential" else 1
        if not 1 <= draft_length <= longest:
            raise UserError(f"draft_length={draft_length} must be 1 to {longest} with model.mtp={kind}")
        self.draft_length, self.drafted, self.accepted = draft_length, 0, 0
        self.prepared = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        stop_ids: Collection[int] = (),
        on_token: Callable[[int, int], bool | None] | None = None,
    ) -> list[list[int]]:
        """As `Generator.generate`. What is drawn with a seed is not what `Generator` draws with it, though
        it has the same distribution."""
        if len(prompts) != 1:
            return super().generate(prompts, params, stop_ids, on_token)
        prompt = self.fit(prompts[0] or [self.start_id], params.max_new_tokens)
        room = min(params.max_new_tokens, self.context - len(prompt))
        answer = []
        if room == 0:
            return [answer]
        training = self.model.training
        self.model.eval()
        try:
            self.prepared = self.fast_decoder()
            sampler = Sampler(params, [prompt], self.model.config.vocab_size, self.device)
            cache = make_cache(self.model, 1, len(prompt) + room)
            draft_cache = make_draft_cache(self.model, 1, len(prompt) + room)
            with few_threads(self.model, len(prompt)):
                logits, hidden = self.verify(prompt, cache, last_only=True)
            new = sampler.pick(logits)
            following = prompt[1:] + new  # the tokens after those that `hidden` (T, C) stands for
            with few_threads(self.model, 1 + self.draft_length):
                while True:
                    for token in new:
                        answer.append(token)
                        stopped = on_token(0, token) if on_token else False
                        if stopped or token in stop_ids or len(answer) == room:
                            return [answer]
                    length = min(self.draft_length, room - len(answer) - 1)
                    drafts, q, seen = self.guess(length, hidden, following, draft_cache, sampler)
                    logits, hidden = self.verify([answer[-1], *drafts], cache)  # (1+g, V), (1+g, C)
                    new = accept(filtered_probs(logits, params, seen), q, drafts, sampler.generators[0])
                    self.drafted, self.accepted = self.drafted + length, self.accepted + len(new) - 1
                    cache.crop([cache.lengths[0] - 1 - length + len(new)])
                    hidden, following = hidden[: len(new)], new
                    if sampler.seen is not None:
                        sampler.seen[0, new] = True
        finally:
            self.model.train(training)

    def guess(self, length, hidden, following, cache, sampler):
        """`length` drafts, their probabilities q, a list of (1, V), and which tokens each place has seen.

        hidden (T, C) of the trunk and the T tokens `following`: those that the head has not read yet. The
        repetition penalty of a place looks at the drafts before it; `seen` is (1 + length, V) bool or None.
        """
        drafts, q, seen = [], [], [sampler.seen]
        known = 0 if cache is None else cache.lengths[0] + len(following)  # columns that stem from no draft
        for _ in range(length):
            logits, hidden = self.draft(hidden, following, cache)
            q.append(filtered_probs(logits, sampler.params, seen[-1]))
            following = [pick(q[-1], uniform(sampler.generators[0]))]
            drafts += following
            if sampler.seen is not None:
                seen.append(seen[-1].clone())
                seen[-1][0, following] = True
        if length and cache is not None:
            cache.crop([known])
        return drafts, q, None if sampler.seen is None else torch.cat(seen)

    def verify(self, tokens, cache, last_only=False):
        """The trunk reads T tokens -> logits (T, V) after each, or (1, V) after the last, and hidden states
        (T, C)."""
        if self.prepared is not None and not last_only:
            return self.prepared.verify(tokens, cache)
        output = self.model(torch.tensor([tokens], device=self.device), cache=cache, last_only=last_only)
        return output.logits[0], output.hidden[0]

    def draft(self, hidden, following, cache):
        """The head reads hidden states (T, C) with the T tokens after them -> logits (1, V) of the token
        after the last, and the hidden state (1, C) that they come from."""
        if cache is None:  # a parallel head looks at one place only
            hidden, following = hidden[-1:], following[-1:]
        if self.prepared is not None and len(following) <= 1 + self.draft_length:  # a prompt is too long
            return self.prepared.draft(hidden, following, cache)
        ids = torch.tensor([following], device=self.device)
        logits, second = draft(self.model, hidden[None], ids, cache, last_only=True)
        return logits[0], second[0, -1:]

    @property
    def device(self):
        """Where the model is."""
        return next(self.model.parameters()).device


def draft(model, hidden, following, cache=None, last_only=False):
    """Return the MTP head's logits (B, T, V) of the token after the next, and its hidden states (B, T, C).

    Args:
        model: a `TinySeek`.
        hidden: (B, T, C) of the trunk, or of the head itself to look further ahead.
        following: (B, T), the token after each.
        cache: from `make_draft_cache`, for the sequential head.
        last_only: return the logits of the last column only, (B, 1, V).
    """
    tokens = following.shape[1]
    if cache is not None:
        cache.begin(tokens)
    context = build_context(tokens, hidden.device, window=model.config.sliding_window, cache=cache)
    rotary = model.model.rotary_emb(context.positions)
    second, _ = model.mtp(hidden, model.model.embed_tokens(following), context, rotary, cache)
    if cache is not None:
        cache.advance()
    return model.logits(second[:, -1:] if last_only else second), second


def accept(p, q, drafts: list[int], generator: torch.Generator) -> list[int]:
    """The accepted drafts, and one token after them that the trunk has chosen.

    p (g+1, V): the trunk's probabilities at the places of the drafts and after the last; q: g times (1, V),
    those that the drafts were drawn from.
    """
    for place, token in enumerate(drafts):
        if uniform(generator) * q[place][0, token] > p[place, token]:
            rest = (p[place : place + 1] - q[place]).clamp(min=0)  # (1, V)
            if not rest.any():  # p and q are equal but for rounding
                rest = p[place : place + 1]
            return [*drafts[:place], pick(rest, uniform(generator))]
    return [*drafts, pick(p[-1:], uniform(generator))]


def pick(weights, number: float) -> int:
    """A token with probability as its weight; weights (1, V) need not add up to 1, number is in (0, 1]."""
    return draw(weights, weights.new_full((1, 1), number)).item()


def uniform(generator: torch.Generator) -> float:
    """A random number in (0, 1]: never 0, so that a token of probability 0 is never accepted or drawn."""
    return 1 - torch.rand((), generator=generator).item()
