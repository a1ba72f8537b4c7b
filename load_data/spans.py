"""Span corruption: spans of a text are taken out, and the model writes them (T5, arXiv 1910.10683, 3.1.4).

    text     Thank you for inviting me to your party last week .
    source   Thank you <extra_id_0> me to your party <extra_id_1> week .
    target   <extra_id_0> for inviting <extra_id_1> last <extra_id_2>

Both list the same pieces of the text in turn: the source keeps every second one and has a sentinel for each
of the others, and the target the other way round, with a last sentinel that ends the last span. A share of
`span.noise_density` of the tokens is taken out, in spans of `span.mean_span_length` on average. As in T5, the
number of spans follows from the length, and every division into spans is equally likely.

T5's own code always takes out the end of a window, and never its beginning. Here text remains on both sides
of every span, as it usually does around a gap that a user writes.

The spans of a window are drawn from (seed, epoch, start of the window), so each epoch takes out
different ones; however a step is divided, and in a resumed run, they are the same.
"""

import re
from collections.abc import Sequence
from itertools import count, takewhile

import numpy as np

from config.objectives import SpanConfig
from load_data.loader import TokenLoader
from load_data.seq2seq import Batch, Pair, collate, framed_pair
from load_data.tokenization.tokenizer import SENTINELS, Tokenizer
from utils.errors import UserError

GAP = re.compile(r"<extra_id_(\d+)>")  # in a user's text
SHORTEST = 3  # tokens of a window: a span, and text on both sides
EVALUATION = -1  # in the place of an epoch


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of `<extra_id_0>`, `<extra_id_1>`, .. Raises `UserError` if there are none."""
    names = (f"<extra_id_{number}>" for number in count())
    found = [tokenizer.special_ids[name] for name in takewhile(tokenizer.special_ids.__contains__, names)]
    if not found:
        raise UserError(f"the tokenizer has no {SENTINELS[0]}: name a model of train/span_train.py, or a T5")
    return found


def segments(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Return the lengths (parts,), each at least 1, of a division of `total`; all are equally likely."""
    cuts = 1 + np.sort(rng.choice(total - 1, parts - 1, replace=False))
    return np.diff(cuts, prepend=0, append=total)


def span_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """Return how many of `length` tokens, at least `SHORTEST`, are taken out, and in how many spans. Some
    text must remain on both sides of each of them."""
    taken = min(max(round(length * density), 1), length - 2)
    return taken, min(max(round(taken / mean), 1), length - taken - 1)


def corrupt(ids: np.ndarray, sentinels: Sequence[int], taken: int, spans: int, rng) -> tuple[list, list]:
    """Take `taken` of the `ids` out in so many `spans`: return source and target."""
    lengths = np.empty(2 * spans + 1, dtype=np.int64)
    lengths[::2] = segments(len(ids) - taken, spans + 1, rng)
    lengths[1::2] = segments(taken, spans, rng)
    pieces = [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])]
    source, target = pieces[0], []
    for sentinel, gone, stays in zip(sentinels, pieces[1::2], pieces[2::2]):
        source += [sentinel, *stays]
        target += [sentinel, *gone]
    return source, [*target, sentinels[spans]]


class SpanPairs(Sequence):
    """The windows of a row of tokens as pairs: number n begins at token n * `length`.

    `pair(start, epoch)` is the pair of any window.
    """

    def __init__(self, tokens: np.ndarray, length: int, settings: SpanConfig, tokenizer: Tokenizer, seed=0):
        """`tokens`: (N,) ids. Raises `UserError` if a window is too short, or too long for the sentinels."""
        self.tokens, self.length, self.tokenizer, self.seed = tokens, length, tokenizer, seed
        self.settings, self.sentinels = settings, sentinel_ids(tokenizer)
        if not SHORTEST <= length <= len(tokens):
            raise UserError(
                f"data.sequence_length={length} must be at least {SHORTEST}, to take a span out, and at most "
                f"the {len(tokens)} tokens of the text: change it"
            )
        spans = span_counts(length, settings.noise_density, settings.mean_span_length)[1]
        if spans >= len(self.sentinels):
            raise UserError(
                f"data.sequence_length={length} gives {spans} spans, and the tokenizer has sentinels for "
                f"{len(self.sentinels) - 1}: lower it or span.noise_density, or raise span.mean_span_length"
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, number: int) -> Pair:
        return self.pair(int(number) * self.length, EVALUATION, self.length)

    def pair(self, start: int, epoch: int, length: int) -> Pair:
        """Return the window of `length` tokens that begins at `start`, with the spans of an epoch."""
        rng = np.random.default_rng((self.seed, epoch - EVALUATION, start))
        counts = span_counts(length, self.settings.noise_density, self.settings.mean_span_length)
        window = self.tokens[start : start + length]
        return framed_pair(self.tokenizer, *corrupt(window, self.sentinels, *counts, rng))


class SpanLoader(TokenLoader):
    """The batches of `TokenLoader`, each window with spans taken out."""

    def __init__(self, pairs: SpanPairs, *steps, start_length: int | None = None, start_id: int):
        """`steps`: batch size, accumulation steps, rank, world size, seed."""
        self.pairs, self.start_id = pairs, start_id
        super().__init__(pairs.tokens, pairs.length, *steps, start_length)
        if self.length < SHORTEST:
            raise UserError(
                f"data.start_length={start_length} must be at least {SHORTEST}, to take a span out: raise it"
            )

    def batch(self, starts: np.ndarray) -> Batch:
        """Return the windows that begin at `starts` (B,), see load_data/seq2seq.py."""
        pairs = [self.pairs.pair(start, self.epoch, self.length) for start in starts.tolist()]
        return collate(pairs, self.pairs.tokenizer.pad_id, self.start_id)


def with_gaps(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a user's text, in which `<extra_id_0>`, .. are sentinels and all else is plain text.

    A space before a gap is left out: it belongs to the word that is missing.
    """
    first, *others = GAP.split(text)  # then number and text in turn
    gaps, sentinels = len(others) // 2, sentinel_ids(tokenizer)
    if others[::2] != [str(number) for number in range(gaps)] or gaps >= len(sentinels):
        found = ", ".join(f"<extra_id_{number}>" for number in others[::2])
        raise UserError(
            f"gaps must be named {SENTINELS[0]}, {SENTINELS[1]}, .. in this order, at most "
            f"{len(sentinels) - 1} of them; the text has {found}"
        )
    *pieces, last = [first, *others[1::2]]
    pieces = [*(piece.removesuffix(" ") for piece in pieces), last]
    ids = tokenizer.encode(pieces[0]) if pieces[0] else []
    for sentinel, piece in zip(sentinels, pieces[1:]):
        ids += [sentinel, *(tokenizer.encode_section(piece) if piece else [])]
    return ids


def spans_of(target: Sequence[int], sentinels: Sequence[int]) -> dict[int, list[int]]:
    """Return what a target lists for each of its sentinels; of two with one name, the last."""
    spans, ids = {}, []
    for one in target:
        if one in sentinels:
            spans[one] = ids = []
        else:
            ids.append(one)
    return spans


def filled(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """Return the ids of `source` with the spans that `target` lists in the place of its sentinels. A gap that
    the target does not name stays empty."""
    spans = spans_of(target, sentinels)
    return [part for one in source for part in (spans.get(one, []) if one in sentinels else [one])]


def exact_share(answers: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], sentinels) -> float:
    """Return the share of the gaps of `targets` that `answers` fill with the right tokens."""
    found = [spans_of(ids, sentinels) for ids in answers]
    true = [[*spans_of(ids, sentinels).items()][:-1] for ids in targets]  # the last ends the last gap
    right = [own.get(gap) == ids for own, gaps in zip(found, true, strict=True) for gap, ids in gaps]
    return sum(right) / len(right)
