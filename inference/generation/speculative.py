"""Self-speculative decoding: the MTP head drafts, the trunk verifies all drafts in one forward.

Where a forward pass is bound by reading weights, several tokens cost little more than one. So each round
drafts g tokens, and the trunk reads them all at once:

    text ... x            x is written, but not yet in the cache
    draft                 d1 .. dg, one by one: the head reads the trunk's last hidden state and x, then its
                          own hidden state and d1, ..
    verify   x d1 .. dg   the trunk's probabilities p0 .. pg, each for the token after
    accept                some drafts, and one token of the trunk after them
    crop                  both caches discard what was not accepted

A round writes 1 to g + 1 tokens. However bad the drafts are, the text has exactly the distribution of the
trunk alone (Leviathan et al., arXiv 2211.17192). For a draft d that was drawn from q:

    accept with probability min(1, p(d) / q(d)); at the first rejection draw from max(p - q, 0), normalised

A token is then written with probability min(p, q) by acceptance, and with the rest, p - min(p, q), by the
second draw. Both p and q have passed the filters of inference/generation/sampling.py. At temperature 0 both
have one token of probability 1, so the same rule gives greedy decoding, token for token.

The sequential head has a cache of its own: column t holds token t+1 and the trunk's hidden state of token t.
While it drafts ahead, its own hidden states stand in; those columns are discarded after each round.
"""

import torch

from inference.generation.generator import Generator, few_threads
from inference.generation.sampling import Sampler, draw, filtered_probs
from model.caches import make_cache, make_draft_cache
from modules.attention.context import build_context
from utils.errors import UserError

LONGEST = 15  # a rolling cache can drop 16 tokens


class SpeculativeGenerator(Generator):
    """Continue one row with drafts, on the plain path, and several rows as `Generator` does.

    Draws with a seed differ from those of `Generator`, but have the same distribution. `draft_length` is g;
    a parallel head drafts one token. `drafted` and `accepted` count tokens over all calls.
    """

    def __init__(self, model, start_id: int = 0, draft_length: int = 1, kv_cache: str = "full"):
        super().__init__(model, start_id, kv_cache=kv_cache)
        kind = model.config.mtp
        if kind == "none":
            raise UserError("this model has no MTP head to draft with: train one with model.mtp=sequential")
        longest = LONGEST if kind == "sequential" else 1
        if not 1 <= draft_length <= longest:
            raise UserError(f"draft_length={draft_length} must be 1 to {longest} with model.mtp={kind}")
        self.draft_length, self.drafted, self.accepted = draft_length, 0, 0

    def write(self, prompts, room: list[int], sampler: Sampler, add, samples=1, recorded=None) -> None:
        """Write as `Generator.write` does, one row with drafts."""
        if len(prompts) != 1 or recorded is not None:
            return super().write(prompts, room, sampler, add, samples, recorded)
        (prompt,), (left,) = prompts, room
        cache = make_cache(self.model, 1, len(prompt) + left, kv_cache=self.kv_cache)
        draft_cache = make_draft_cache(self.model, 1, len(prompt) + left)
        with few_threads(self.model, len(prompt)):
            output = self.read(prompt, cache, last_only=True)
        new = sampler.pick(output.logits[0])
        hidden, following = output.hidden, prompt[1:] + new  # (1, T, C), and the tokens after those T
        with few_threads(self.model, 1 + self.draft_length):
            while all(add(0, token) for token in new):
                left -= len(new)
                length = min(self.draft_length, left - 1)
                drafts, q, seen = self.guess(length, hidden, following, draft_cache, sampler)
                output = self.read([new[-1], *drafts], cache)  # logits (1, 1+g, V)
                p = filtered_probs(output.logits[0], sampler.params, seen)
                new = enforced(accept(p, q, drafts, sampler.generators[0]), sampler.must)
                self.drafted, self.accepted = self.drafted + length, self.accepted + len(new) - 1
                cache.crop([cache.lengths[0] - 1 - length + len(new)])
                hidden, following = output.hidden[:, : len(new)], new
                sampler.seen[0, new] = True

    def read(self, tokens: list[int], cache, **options):
        """Run the trunk on one row of tokens."""
        return self.model(torch.tensor([tokens], device=self.device), cache=cache, **options)

    def guess(self, length: int, hidden, following: list[int], cache, sampler: Sampler):
        """Return `length` drafts, their probabilities q, a list of (1, V), and the tokens seen at each place.

        hidden (1, T, C) of the trunk and the T tokens `following` are those that the head has not read yet.
        The repetition penalty of a place counts the drafts before it; `seen` is (1 + length, V) bool.
        """
        drafts, q, seen = [], [], sampler.seen.repeat(1 + length, 1)
        known = 0 if cache is None else cache.lengths[0] + len(following)  # columns without drafts
        for place in range(length):
            ids = torch.tensor([following], device=self.device)
            logits, hidden = draft(self.model, hidden, ids, cache, last_only=True)
            hidden = hidden[:, -1:]
            q.append(filtered_probs(logits[0], sampler.params, seen[place, None]))
            following = [pick(q[-1], uniform(sampler.generators[0]))]
            drafts += following
            seen[place + 1 :, following] = True
        if length and cache is not None:
            cache.crop([known])
        return drafts, q, seen


def draft(model, hidden, following, cache=None, last_only=False):
    """Return the MTP head's logits (B, T, V) of the token after the next, and its hidden states (B, T, C).

    Args:
        hidden: (B, T, C) of the trunk, or of the head itself to look further ahead.
        following: (B, T), the token after each.
        cache: from `make_draft_cache`, for the sequential head.
        last_only: return the logits of the last column only, (B, 1, V).
    """
    tokens = following.shape[1]
    if cache is not None:
        cache.begin(tokens)
    config = model.config
    window, sinks = config.layer_window(config.num_hidden_layers), config.attention_sinks
    context = build_context(tokens, hidden.device, window=window, sinks=sinks, cache=cache)
    rotary = model.model.rotary_emb(context.positions, None if cache is None else cache.planned)
    second, _ = model.mtp(hidden, model.model.embed_tokens(following), context, rotary, cache)
    if cache is not None:
        cache.advance()
    return model.logits(second[:, -1:] if last_only else second), second


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


def enforced(new: list[int], must) -> list[int]:
    """Return `new`, or its tokens up to where `must` (see `Sampler`) requires another, and that one."""
    for place, token in enumerate(new if must else ()):
        required = must(0, new[:place])
        if required not in (None, token):
            return [*new[:place], required]
    return new


def pick(weights, number: float) -> int:
    """Return a token, drawn by weights (1, V) of any sum with a random `number` in (0, 1]."""
    return draw(weights, weights.new_full((1, 1), number)).item()


def uniform(generator: torch.Generator) -> float:
    """Return a random number in (0, 1]: never 0, so a token of probability 0 is never accepted or drawn."""
    return 1 - torch.rand((), generator=generator).item()
