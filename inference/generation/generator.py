"""The generation engine: prompts in, continuations out, for any model with a cache.

    Generator(model).generate([[5, 17, 9], [23]], SamplingParams(temperature=0), stop_ids={0})

Prompts of different lengths share one batch: they are padded on the right, and the cache knows how many real
tokens each row has. A row ends at a stop token, after `max_new_tokens`, when the context is full, or when
`on_token` returns True. Its result does not depend on the other rows, except that in fp32 two almost equal
candidates may change places, because sums are taken in another order. With a `rope_scaling` that depends on
the length (dynamic, longrope), a row is read for the length of its prompt plus `max_new_tokens`.

A prompt that is to be continued several times (`samples`) is read once, and its cache is copied. Rows that
have ended leave the batch when they are half of it.

Prompt and answer together never exceed `max_position_embeddings`. A prompt is never shortened here; callers
keep its last `room` tokens.
"""

import warnings
from collections.abc import Callable, Collection
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence

from inference.fast.decoder import FastDecoder, agree, decoders, fingerprint, refusal
from inference.generation.sampling import Sampler, SamplingParams
from model.caches import check_kv_cache, make_cache
from modules.experts.router import routing_codes
from utils.errors import UserError

SMALL = 32 * 2**20  # bytes of weights up to which a second CPU thread does not help
FEW = 32  # and tokens per forward, likewise
open_contexts = []  # thread counts before each open `few_threads`; the first is restored


class Answer(list):
    """The new tokens of one row, including the stop token."""

    finish_reason = "length"  # cut after `max_new_tokens` or by a full context; "stop" for any other end
    # only with `record`:
    logprobs: list[float]  # of each new token, under the distribution it was drawn from
    experts: list[int]  # `routing_codes` of prompt and answer, without the last token; empty without experts


class Generator:
    """Continue rows of tokens with `model`.

    Args:
        model: a `TinySeek`, or a module with the same `forward` and `config`, as `EncoderDecoder.reading`
            returns it for its sources.
        start_id: the token that replaces an empty prompt; 0 is the end-of-text token of every tokenizer here.
        fast: True if `FastDecoder` may be used.
        kv_cache: the kind of its caches, one of `KV_KINDS` (model/caches.py).

    Attributes:
        why_plain: the reason why the last rows did not use `FastDecoder`; empty if they did.
    """

    def __init__(self, model, start_id: int = 0, fast: bool = True, kv_cache: str = "full"):
        check_kv_cache(model.config, kv_cache)
        self.kv_cache = kv_cache
        self.model, self.start_id, self.fast = model, start_id, fast
        self.context = model.config.max_position_embeddings - getattr(model, "prefix_length", 0)
        self.decoder, self.prepared_from, self.why_plain = None, None, ""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        stop_ids: Collection[int] = (),
        on_token: Callable[[int, int], bool | None] | None = None,
        samples: int = 1,
        seeds: list[int] | None = None,
        record: bool = False,
        must: Callable[[int, list[int]], int | None] | None = None,
    ) -> list[Answer]:
        """Return the new tokens of each row.

        Each new token is passed to `on_token(row, token)` at once; the row ends where that returns True.
        Prompt p is continued `samples` times, in rows p * samples and following. `seeds`: of each row, by
        default made from that of `params`. `record`: fill in `logprobs` and `experts` of the answers.
        `must(row, new tokens so far)` may return the token that has to come next, whatever the model prefers.
        Raises `TypeError` for anything but lists of ids, and `UserError` for a prompt beyond the context, or
        for rules of sampling that cannot be recorded.
        """
        prompts = [prompt for prompt in self.check(prompts) for _ in range(samples)]
        room = [min(params.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        answers = [Answer() for _ in prompts]
        if record:
            params.check_recorded()
            for answer in answers:
                answer.logprobs, answer.experts = [], []

        def add(row: int, token: int) -> bool:
            answers[row].append(token)
            if (on_token and on_token(row, token)) or token in stop_ids:
                answers[row].finish_reason = "stop"
                return False
            return len(answers[row]) < room[row]

        training = self.model.training
        self.model.eval()
        try:
            if any(room):
                vocabulary = self.model.config.vocab_size
                sampler = Sampler(params, prompts, vocabulary, self.device, stop_ids, seeds)
                if must:
                    sampler.must = lambda row, ahead=(): must(row, [*answers[row], *ahead])
                self.write(prompts, room, sampler, add, samples, answers if record else None)
        finally:
            self.model.train(training)
        return answers

    def write(self, prompts, room: list[int], sampler: Sampler, add, samples=1, recorded=None) -> None:
        """Write up to `room[row]` tokens in each row; `add(row, token)` returns False if the row ends.

        `recorded`: the answers, to fill in what is recorded.
        """
        first = range(0, len(prompts), samples)  # the first row of each prompt, which is read for all
        lengths = [len(prompts[row]) for row in first]
        planned = [len(prompts[row]) + room[row] for row in first]
        cache = make_cache(self.model, len(first), max(planned), planned, self.kv_cache)
        decoder = self.fast_decoder(len(prompts))
        rows, active = list(range(len(prompts))), [places > 0 for places in room]
        ids = pad_sequence([torch.tensor(prompts[row]) for row in first], batch_first=True)  # (B, T)
        new = None if min(lengths) == max(lengths) else lengths
        with few_threads(self.model, sum(lengths)):
            logits, codes = self.forward(ids, cache, new, recorded)
        if samples > 1:
            copies = [row // samples for row in rows]
            cache.select(copies)
            logits = logits[copies]
        for row in rows if codes else ():
            recorded[row].experts = codes[row // samples][: lengths[row // samples]]
        with few_threads(self.model, len(prompts)):
            while True:
                tokens = sampler.pick(logits, rows)
                if recorded is not None:
                    for row, go, value in zip(rows, active, sampler.logprobs.tolist(), strict=True):
                        if go:
                            recorded[row].logprobs.append(value)
                active = [go and add(*one) for go, one in zip(active, zip(rows, tokens), strict=True)]
                if not any(active):
                    return
                if 2 * sum(active) <= len(rows):
                    left = [place for place, go in enumerate(active) if go]
                    cache.select(left)
                    rows, tokens = ([each[place] for place in left] for each in (rows, tokens))
                    active = [True] * len(rows)
                new = None if all(active) else [int(one) for one in active]  # finished rows do not move
                logits, codes = self.forward(torch.tensor(tokens)[:, None], cache, new, recorded, decoder)
                for row, go, code in zip(rows, active, codes or ()):
                    if go:
                        recorded[row].experts += code

    def room(self, max_new_tokens: int) -> int:
        """Return the length of a prompt that leaves room for the answer: at least half of the context."""
        return max(self.context - max_new_tokens, self.context // 2, 1)

    def check(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return `prompts` with a start token in empty ones. Raises as `generate` does."""
        rows = prompts if isinstance(prompts, (list, tuple)) else [None]
        if not all(isinstance(row, (list, tuple)) and {type(one) for one in row} <= {int} for row in rows):
            raise TypeError(
                "prompts must be lists of token ids, for example [[5, 17], [23]]: encode a text first, "
                "[tokenizer.encode(text)], and write a tensor as tensor.tolist()"
            )
        prompts = [list(prompt) or [self.start_id] for prompt in prompts]
        longest, context = max(map(len, prompts), default=0), self.context
        if longest > context:
            raise UserError(f"a prompt of {longest} tokens does not fit in the context of {context}: cut it")
        return prompts

    def forward(self, ids, cache, new: list[int] | None, recorded=None, decoder=None):
        """Run the model, or its fast decoder, on ids (B, T), of which `new` are real (None: all); return each
        row's last logits, and what to record about experts: a list (B) of lists (T), or None."""
        record = recorded is not None
        if decoder is not None:
            logits, routings = decoder.step(ids[:, 0].tolist(), cache, new, record)
        else:
            output = self.model(ids.to(self.device), cache=cache, new_tokens=new, last_only=True)
            logits, routings = output.logits[:, 0], output.routings
        return logits, routing_codes(routings).view(ids.shape).tolist() if record and routings else None

    def fast_decoder(self, rows: int = 1) -> FastDecoder | None:
        """Return the prepared decoder, rebuilt if the model has changed, or None: `why_plain`."""
        self.why_plain = refusal(self.model, rows) if self.fast else "the fast path is switched off"
        if self.why_plain:
            return None
        if self.prepared_from != (state := fingerprint(self.model)):
            self.decoder, self.prepared_from = decoders.get(state) or FastDecoder(self.model), state
            if state in decoders or agree(self.decoder, self.model):
                decoders[state] = self.decoder
            else:
                self.decoder = None
                warnings.warn("FastDecoder and the model disagree: the plain path is used", stacklevel=3)
        self.why_plain = "" if self.decoder else "logits differ"
        return self.decoder


@contextmanager
def few_threads(model, tokens: int):
    """Use one CPU thread while a small model reads few `tokens`: their products are too short to share.

    Measured on two cores, a second thread makes decoding of one row 2 to 7 % slower if the machine is idle,
    and 10 to 100 times slower if it is busy. Contexts may overlap in any order, also across Python threads.
    """
    weights = (*model.parameters(), *model.buffers())  # those of a quantised model are buffers
    if tokens > FEW or sum(weight.nbytes for weight in weights) > SMALL:
        yield
        return
    open_contexts.append(torch.get_num_threads())
    threads = open_contexts[0]
    torch.set_num_threads(1)
    try:
        yield
    finally:
        open_contexts.pop()
        torch.set_num_threads(threads)
