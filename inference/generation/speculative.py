"""Self-speculative decoding: the MTP head drafts, the trunk verifies all drafts in one forward.

A forward over a few tokens costs little more than one over a single token (4 layers on a CPU: 1.25 times as
long for two, 1.3 times for five). So each round drafts g tokens, and the trunk reads them all at once:

    text ... x            x is written, but not yet in the cache
    draft                 d1 .. dg, one by one: the head reads the trunk's last hidden state and x, then its
                          own hidden state and d1, ..
    verify   x d1 .. dg   the trunk's probabilities p0 .. pg, each for the token after
    accept                some drafts, and one token of the trunk after them
    crop                  both caches discard what was not accepted

so each round writes 1 to g + 1 tokens. However bad the drafts are, the text has exactly the distribution that
the trunk alone would give (Leviathan et al., arXiv 2211.17192). For a draft d that was drawn from q:

    accept with probability min(1, p(d) / q(d)); at the first rejection draw from max(p - q, 0), normalised

A token is then written with probability min(p, q) by acceptance, and with the rest, p - min(p, q), by the
second draw. On average sum min(p, q) of the drafts are accepted. p and q are the probabilities after all the
filters of inference/generation/sampling.py. At temperature 0 both have one token of probability 1, and the
same rule accepts while the draft is the trunk's most likely token: greedy decoding, token for token.

The sequential head has a cache of its own. Its column t holds token t+1 and the trunk's hidden state of token
t. While it drafts ahead, its own hidden state stands in, so those columns are discarded after each round and
written again from the trunk's.
"""

from collections.abc import Callable, Collection

import torch

from inference.generation.drafting import draft
from inference.generation.generator import Answer, Generator, few_threads
from inference.generation.sampling import Sampler, SamplingParams, draw, filtered_probs
from model.caches import make_cache, make_draft_cache
from utils.errors import UserError

LONGEST = 15  # a rolling cache takes back 16 tokens


class SpeculativeGenerator(Generator):
    """Continue one row with drafts, and several rows as `Generator` does.

    Args:
        model: a `TinySeek` with an MTP head.
        start_id: the token that replaces an empty prompt.
        draft_length: g, the most tokens drafted at a time; a parallel head drafts one.
        fast: whether trunk and head may use `FastDecoder`.

    Attributes:
        drafted, accepted: numbers of tokens over all calls. A draft after a rejected one is not accepted.
    """

    def __init__(self, model, start_id: int = 0, draft_length: int = 1, fast: bool = True):
        super().__init__(model, start_id, fast)
        kind = model.config.mtp
        if kind == "none":
            raise UserError("this model has no MTP head to draft with: train one with model.mtp=sequential")
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
    ) -> list[Answer]:
        """Return what `Generator.generate` returns. Draws with a seed differ from those of `Generator`, but
        have the same distribution."""
        if len(prompts) != 1:
            return super().generate(prompts, params, stop_ids, on_token)
        prompt = self.check(prompts)[0]
        room = min(params.max_new_tokens, self.context - len(prompt))
        answer = Answer()
        if room == 0:
            return [answer]
        training = self.model.training
        self.model.eval()
        try:
            self.prepared = self.fast_decoder()
            sampler = Sampler(params, [prompt], self.model.config.vocab_size, self.device, stop_ids)
            cache = make_cache(self.model, 1, len(prompt) + room)
            draft_cache = make_draft_cache(self.model, 1, len(prompt) + room)
            with few_threads(self.model, len(prompt)):
                logits, hidden = self.verify(prompt, cache, last_only=True)
            new = sampler.pick(logits)
            following = prompt[1:] + new  # the tokens after those that `hidden` (T, C) stands for
            with few_threads(self.model, 1 + self.draft_length):
                while True:
                    for token in new:
                        stopped = bool(on_token and on_token(0, token)) or token in stop_ids
                        if answer.add(token, stopped, room):
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
        """Return `length` drafts, their probabilities q, a list of (1, V), and the tokens seen at each place.

        hidden (T, C) of the trunk and the T tokens `following` are those that the head has not read yet. The
        repetition penalty of a place counts the drafts before it; `seen` is (1 + length, V) bool or None.
        """
        drafts, q, seen = [], [], [sampler.seen]
        known = 0 if cache is None else cache.lengths[0] + len(following)  # columns without drafts
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
        """Run the trunk on T tokens; return logits (T, V) or (1, V) of the last, and hidden states (T, C)."""
        if self.prepared is not None and not last_only:
            return self.prepared.verify(tokens, cache)
        output = self.model(torch.tensor([tokens], device=self.device), cache=cache, last_only=last_only)
        return output.logits[0], output.hidden[0]

    def draft(self, hidden, following, cache):
        """Run the head on hidden states (T, C) and the T tokens that follow them; return logits (1, V) of the
        token after the last, and the hidden state (1, C) that they come from."""
        if cache is None:  # a parallel head reads one place only
            hidden, following = hidden[-1:], following[-1:]
        if self.prepared is not None and len(following) <= 1 + self.draft_length:  # a prompt is too long
            return self.prepared.draft(hidden, following, cache)
        ids = torch.tensor([following], device=self.device)
        logits, second = draft(self.model, hidden[None], ids, cache, last_only=True)
        return logits[0], second[0, -1:]

    @property
    def device(self):
        """The device of the model."""
        return next(self.model.parameters()).device


def accept(p, q, drafts: list[int], generator: torch.Generator) -> list[int]:
    """Return the accepted drafts, and one token after them that the trunk has chosen.

    p (g+1, V): the trunk's probabilities at the places of the drafts and after the last; q: g times (1, V),
    the probabilities that the drafts were drawn from.
    """
    for place, token in enumerate(drafts):
        if uniform(generator) * q[place][0, token] > p[place, token]:
            rest = (p[place : place + 1] - q[place]).clamp(min=0)  # (1, V)
            if not rest.any():  # p and q are equal except for rounding
                rest = p[place : place + 1]
            return [*drafts[:place], pick(rest, uniform(generator))]
    return [*drafts, pick(p[-1:], uniform(generator))]


def pick(weights, number: float) -> int:
    """Return a token, drawn by weights (1, V) of any sum with a random `number` in (0, 1]."""
    return draw(weights, weights.new_full((1, 1), number)).item()


def uniform(generator: torch.Generator) -> float:
    """Return a random number in (0, 1]: never 0, so a token of probability 0 is never accepted or drawn."""
    return 1 - torch.rand((), generator=generator).item()
