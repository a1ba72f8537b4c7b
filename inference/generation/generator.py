"""The generation engine: prompts in, continuations out, for any model with a cache.

    Generator(model).generate([[5, 17, 9], [23]], SamplingParams(temperature=0), stop_ids={0})

Prompts of different lengths share one batch: they are padded on the right, and the cache knows how many real
tokens each row has. A row is done when it meets a stop token, has `max_new_tokens`, fills the context, or
when `on_token` says so; the batch is done when all rows are. What a row gets does not depend on the rows
beside it: in fp64 exactly, while in fp32 two almost equal candidates may change places, as sums are taken
in another order.

The limit: prompt and answer together never exceed `max_position_embeddings`, the longest text that the
model was made for. A prompt that leaves no room for `max_new_tokens` loses its beginning, though half of
the context is always its own; an answer that fills the context ends there.
"""

from collections.abc import Callable, Collection
from contextlib import contextmanager

import torch

from inference.fast.decoder import FastDecoder, supports
from inference.generation.sampling import Sampler, SamplingParams
from model.caches import make_cache

SMALL = 32 * 2**20  # bytes of weights up to which, and
FEW = 32  # tokens in one forward up to which a second CPU thread is no gain


class Generator:
    """Continues token rows with `model`.

    Args:
        model: a `TinySeek`, or a module with its `forward(ids, cache, new_tokens, last_only)` and `config`.
        start_id: where an empty prompt starts; 0 is the end-of-text token of every TinySeek tokenizer.
        fast: a single row goes through `FastDecoder` where that supports the model; False: never.
    """

    def __init__(self, model, start_id: int = 0, fast: bool = True):
        self.model, self.start_id, self.fast = model, start_id, fast
        self.context = model.config.max_position_embeddings - getattr(model, "prefix_length", 0)
        self.decoder, self.prepared_from = None, None

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        stop_ids: Collection[int] = (),
        on_token: Callable[[int, int], bool | None] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each row; a stop token, where one was met, is the last of them.

        `on_token(row, token)` is called for each new token as it comes; where it returns True, the row ends.
        """
        if not prompts:
            return []
        prompts = [self.fit(prompt or [self.start_id], params.max_new_tokens) for prompt in prompts]
        room = [min(params.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        answers = [[] for _ in prompts]
        active = [places > 0 for places in room]
        training = self.model.training
        self.model.eval()
        try:
            device = next(self.model.parameters()).device
            sampler = Sampler(params, prompts, self.model.config.vocab_size, device)
            capacity = max(len(prompt) + places for prompt, places in zip(prompts, room, strict=True))
            cache = make_cache(self.model, len(prompts), capacity)
            decoder = self.fast_decoder() if len(prompts) == 1 else None
            with few_threads(self.model, sum(map(len, prompts))):
                logits = self.prefill(prompts, cache, device)  # (B, V)
            with few_threads(self.model, len(prompts)):
                while True:
                    tokens = sampler.pick(logits)
                    for row, token in enumerate(tokens):
                        if active[row]:
                            answers[row].append(token)
                            stopped = on_token(row, token) if on_token else False
                            full = len(answers[row]) == room[row]
                            active[row] = not (full or stopped or token in stop_ids)
                    if not any(active):
                        return answers
                    if decoder is not None:
                        logits = decoder.step(tokens[0], cache)
                    else:
                        new = None if all(active) else [int(one) for one in active]  # the others stand still
                        ids = torch.tensor(tokens, device=device)[:, None]  # (B, 1)
                        logits = self.model(ids, cache=cache, new_tokens=new, last_only=True).logits[:, 0]
        finally:
            self.model.train(training)

    def fit(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        """The end of `prompt` that is read: see the limit above."""
        return prompt[-max(self.context - max_new_tokens, self.context // 2, 1) :]

    def prefill(self, prompts: list[list[int]], cache, device):
        """All prompts in one forward, padded on the right -> logits (B, V) after each row's last token."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)  # (B, T)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        new = None if min(lengths) == max(lengths) else lengths
        return self.model(ids.to(device), cache=cache, new_tokens=new, last_only=True).logits[:, 0]

    def fast_decoder(self) -> FastDecoder | None:
        """The prepared decoder, made anew if the weights have changed; None if it cannot be had.

        PyTorch counts the changes to each tensor in place; only changes through `.data` escape it.
        """
        if not self.fast or not supports(self.model):
            return None
        state = [
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in (*self.model.parameters(), *self.model.buffers())
        ]
        if state != self.prepared_from:
            self.decoder, self.prepared_from = FastDecoder(self.model), state
        return self.decoder


@contextmanager
def few_threads(model, tokens: int):
    """One CPU thread for forwards of a small model over few `tokens`: their products are too short to share.

    Measured on two cores: for one row on a nearly idle machine a second thread makes decoding 2 to 7 %
    slower. On a busy one threads wait for each other a hundred times a token: 10 to 100 times as slow, at 1
    to 16 rows.
    """
    threads = torch.get_num_threads()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size <= SMALL and tokens <= FEW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
