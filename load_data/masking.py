"""Masked tokens: some tokens of a row are hidden, and a model that reads in both directions predicts them.

    of all tokens of a text     85 % keep their place and have no label
    of the other 15 %           80 % become the mask, 10 % a token at random, 10 % stay as they are

(BERT, arXiv 1810.04805, section 3.1; the shares are settings.) Every token of the 15 % is predicted, whatever
stands in its place. Texts to which the model is later applied have no masks, so it must not learn that only
masks matter.

Nothing is shifted here: `labels[t]` is the token that belongs AT t, or -100.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from config.objectives import MLMConfig
from load_data.items import padded
from load_data.loader import IGNORED, TokenLoader, eval_batches
from load_data.tokenization.tokenizer import MASK, Tokenizer
from utils.errors import UserError

HELD_OUT = MLMConfig(mask_ratio=0.15, replaced_by_mask=1.0, replaced_by_random=0.0)  # however a run trains
WRITTEN = "[MASK]"  # for the mask, in a user's text


class Masking:
    """Hides tokens of framed rows. Special tokens are neither hidden nor put in another's place."""

    def __init__(self, tokenizer: Tokenizer, settings: MLMConfig):
        self.begin, self.finish, self.pad_id = tokenizer.begin, tokenizer.finish, tokenizer.pad_id
        self.settings, self.mask_id = settings, tokenizer.special_ids[MASK]
        self.is_special = np.isin(np.arange(tokenizer.vocab_size), [*tokenizer.special_ids.values()])
        self.ordinary = np.flatnonzero(~self.is_special)

    def room(self, sequence_length: int) -> int:
        """Return how many tokens of a text fit into a row."""
        room = sequence_length - len(self.begin) - len(self.finish)
        if room < 1:
            raise UserError(
                f"data.sequence_length={sequence_length} leaves no room for text between the special tokens "
                f"around it: set it to {sequence_length - room + 1} or more"
            )
        return room

    def row(self, window: np.ndarray, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """window (N,) of ids -> ids (T,) with some hidden, and labels (T,). Equal seeds hide the same."""
        ids = np.concatenate([self.begin, window, self.finish]).astype(np.int64)
        rng, shares = np.random.default_rng(seed), self.settings
        asked = (rng.random(len(ids)) < shares.mask_ratio) & ~self.is_special[ids]
        labels, fate = np.where(asked, ids, IGNORED), rng.random(len(ids))
        hidden = asked & (fate < shares.replaced_by_mask)
        random = asked & ~hidden & (fate < shares.replaced_by_mask + shares.replaced_by_random)
        ids[hidden] = self.mask_id
        ids[random] = rng.choice(self.ordinary, random.sum())
        return ids, labels

    def batch(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Stack rows: `input_ids` and `labels` (B, T), and a `padding_mask` where they differ in length."""
        ids, labels = zip(*rows, strict=True)
        input_ids, real = padded(ids, self.pad_id)
        batch = {"input_ids": input_ids, "labels": padded(labels, IGNORED)[0]}
        return batch if real.all() else batch | {"padding_mask": real}


class MaskedLoader(TokenLoader):
    """A `TokenLoader` of rows with hidden tokens. What is hidden in a window follows from the seed, the epoch
    and the window alone: however a step is divided, and in a resumed run, it is the same."""

    def __init__(
        self, tokens: np.ndarray, masking: Masking, sequence_length: int, *sizes,
        start_length: int | None = None, seed: int = 0,
    ):  # fmt: skip
        """`sizes`: batch size, accumulation steps, rank, world size. Lengths are those of framed rows."""
        self.masking = masking
        start_length = start_length and masking.room(start_length)
        super().__init__(
            tokens, masking.room(sequence_length), *sizes, seed=seed, start_length=start_length
        )

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch's windows. A step may take windows of several epochs, so the number of a
        window says which: epoch * N + start, for N tokens."""
        super().start_epoch(epoch)
        self.starts = self.starts + epoch * len(self.tokens)

    def batch(self, windows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the windows with these numbers (B,)."""
        rows = []
        for number in windows.tolist():
            start = number % len(self.tokens)
            rows.append(self.masking.row(self.tokens[start : start + self.length], (self.seed, number)))
        return self.masking.batch(rows)


def count_rows(tokens: np.ndarray, masking: Masking, sequence_length: int) -> int:
    """Return the number of rows of an evaluation on all `tokens`."""
    return -(-len(tokens) // masking.room(sequence_length))  # rounded up


def eval_masked(
    tokens: np.ndarray, masking: Masking, sequence_length: int, batch_size: int,
    max_batches: int | None = None, rank: int = 0, world_size: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:  # fmt: skip
    """Yield the batches of an evaluation, which hide the same tokens every time; with `max_batches` (per
    rank), as many windows as that allows, evenly spread."""
    room, count = masking.room(sequence_length), count_rows(tokens, masking, sequence_length)
    for chosen in eval_batches(count, batch_size, max_batches, rank, world_size):
        windows = [(tokens[n * room : (n + 1) * room], (n,)) for n in chosen.tolist()]
        yield masking.batch([masking.row(*one) for one in windows])


def encode_masked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the framed ids of `text`, with the mask for each `[MASK]` in it.

    The text is split first: a tokenizer must not see a word that a user wrote as a special token. A space
    before a mask is left out where the tokenizer would make it part of the word that follows (" os" is one
    token): the masked token brings it along.
    """
    ids: list[int] = []
    for number, piece in enumerate(text.split(WRITTEN)):
        ids += [tokenizer.special_ids[MASK]] * (number > 0)
        encode = tokenizer.encode_inside if number else tokenizer.encode
        # As the beginning of a longer text: `x` is always in one token, the last.
        ids += encode(piece + "x")[:-1] if piece[-1:].isspace() else encode(piece)
    return tokenizer.framed(ids)
