"""Pairs of a source to read and a target to write, for an encoder-decoder: ids -> batches.

    source a b c, target X Y, in rows of the longest source and the longest target:

    input_ids             a b c $ . .     $ ends a text (in other tokenizers, something begins it instead)
    padding_mask          1 1 1 1 0 0     . is padding
    decoder_input_ids     > X Y .         > is `seq2seq.decoder_start_token_id`
    labels                X Y $ -         the shift happens here and nowhere else; - is -100
    decoder_padding_mask  1 1 1 0

Both sides are padded on the right, and padding has no label: it changes neither the loss nor an output.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from load_data.items import ItemLoader, padded
from load_data.loader import IGNORED, eval_batches
from load_data.tokenization.tokenizer import Tokenizer

Batch = dict[str, torch.Tensor]


class Pair(NamedTuple):
    """The ids of a source and of a target, ends of text included."""

    source: Sequence[int]
    target: Sequence[int]


def framed_pair(tokenizer: Tokenizer, source: Sequence[int], target: Sequence[int]) -> Pair:
    """Return a source as an encoder reads it, and a target with the end that stops a generation."""
    return Pair(tokenizer.framed(source), [*target, *(tokenizer.finish or [tokenizer.eos_id])])


def collate(pairs: Sequence[Pair], pad_id: int, start_id: int) -> Batch:
    """Return pairs as the tensors above: sources (B, S), targets (B, T)."""
    sources, targets = zip(*pairs, strict=True)
    input_ids, real = padded(sources, pad_id)
    labels, written = padded(targets, IGNORED)
    shifted = torch.full_like(labels, start_id)
    shifted[:, 1:] = labels[:, :-1]
    return {"input_ids": input_ids, "padding_mask": real, "labels": labels,
            "decoder_input_ids": shifted.where(written, pad_id), "decoder_padding_mask": written}  # fmt: skip


class Seq2SeqLoader(ItemLoader):
    """Endless training batches of pairs. `steps` and `settings` are those of `ItemLoader`."""

    def __init__(self, pairs: Sequence[Pair], *steps: int, pad_id: int, start_id: int, **settings: int):
        self.pairs, self.pad_id, self.start_id = pairs, pad_id, start_id
        super().__init__(len(pairs), *steps, **settings)

    def batch(self, chosen: np.ndarray) -> Batch:
        """Return the tensors of some pairs."""
        return collate([self.pairs[one] for one in chosen], self.pad_id, self.start_id)


def eval_pairs(
    pairs: Sequence[Pair], batch_size: int, max_batches: int | None = None, rank: int = 0,
    world_size: int = 1, *, pad_id: int, start_id: int,
) -> Iterator[Batch]:  # fmt: skip
    """Yield batches with every pair once, in order; with `max_batches` (per rank), as many as that allows,
    evenly spread."""
    for chosen in eval_batches(len(pairs), batch_size, max_batches, rank, world_size):
        yield collate([pairs[one] for one in chosen], pad_id, start_id)
