"""The cloze, in numbers: one token of a held-out line is masked, and a model and tables of counts guess it.

    python train/lab/compare_cloze.py
    python train/lab/compare_cloze.py --checkpoint out/bert/TinySeek_MLM_final.pkl --count 500

Each line is shown twice: alone, and with the lines around it, as far as the model reads. The model
is compared with tables of counts from the same training tokens. Each ranks what it saw most often between
the same neighbours, then asks the next table:

    unigram     the most frequent tokens                      trigram     the two tokens to the left, then one
    two-sided   the tokens to the left and to the right, then the trigram's tables

The pseudo-perplexity of the lines is exp(mean of -log p(token | all others)), each of their tokens masked
alone (Salazar et al., arXiv 1910.14659).
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
import numpy as np
import torch
from tqdm import tqdm

from inference.generation.load import DEFAULT_OUT, load_encoder
from load_data.packing import prepare_pretraining
from load_data.tokenization.tokenizer import MASK, Tokenizer
from model.encoder import MaskedLM
from utils.checkpoint import final_name
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

WORDS, MOST, ROWS = 4, 5, 16  # words in a line at least; guesses that count; rows of a batch
Item = tuple[list[int], int]  # a framed row of ids, and the place to guess


class Line(NamedTuple):
    """A line in a row of tokens: tokens[start:stop], of which tokens[target] is to be found."""

    start: int
    stop: int
    target: int


class Counts:
    """Counts of each token between given neighbours, at `offsets` from it: (-2, -1) in a trigram."""

    def __init__(self, tokens: np.ndarray, offsets: tuple[int, ...], vocab_size: int):
        before, after = max(0, -min(offsets, default=0)), max(0, max(offsets, default=0))
        places = np.arange(before, len(tokens) - after)
        self.offsets, self.vocab_size = offsets, vocab_size
        keys = self.key([tokens[places + offset] for offset in offsets]) + tokens[places].astype(np.int64)
        self.keys, self.counts = np.unique(keys, return_counts=True)

    def key(self, neighbours: Sequence):
        """Return the first number of those that stand for these neighbours and any token."""
        total = np.int64(0)
        for one in neighbours:
            total = (total + np.int64(one)) * self.vocab_size
        return total

    def ranked(self, row: Sequence[int], place: int) -> list[int]:
        """Return the tokens seen between the neighbours of `place`, the most frequent first; of equals, the
        lower id."""
        if any(not 0 <= place + offset < len(row) for offset in self.offsets):
            return []
        first = self.key([row[place + offset] for offset in self.offsets])
        low, high = np.searchsorted(self.keys, [first, first + self.vocab_size])
        order = np.argsort(-self.counts[low:high], kind="stable")[:MOST]
        return (self.keys[low:high][order] - first).tolist()


def guesses(tables: Sequence[Counts], row: Sequence[int], place: int) -> list[int]:
    """Return the first guesses of tables that are asked in turn, each token once."""
    found = dict.fromkeys(one for table in tables for one in table.ranked(row, place))
    return [*found][:MOST]


def pick_lines(tokens: np.ndarray, tokenizer: Tokenizer, count: int, longest: int, seed: int) -> list[Line]:
    """Draw `count` lines with at least `WORDS` words, and of each a token that is not white space. A token
    with a line break ends a line, and so does a special one."""
    spelled = [part.decode("utf-8", errors="replace") for part in tokenizer.id_to_bytes]
    special, good, start = {*tokenizer.special_ids.values()}, [], 0
    for place, one in enumerate(tokens.tolist()):
        if one in special or "\n" in spelled[one]:
            texts = [spelled[part] for part in tokens[start : place + 1]]
            if sum(any(map(str.isalnum, text)) for text in texts) >= WORDS and len(texts) <= longest:
                good.append((start, place + (one not in special)))
            start = place + 1
    if not good:
        raise UserError(f"no held-out line has {WORDS} words: was the model trained on text without lines?")
    rng = np.random.default_rng(seed)
    lines = [good[one] for one in np.sort(rng.choice(len(good), min(count, len(good)), replace=False))]
    targets = [[place for place in range(*line) if spelled[tokens[place]].strip()] for line in lines]
    return [Line(*line, int(rng.choice(places))) for line, places in zip(lines, targets, strict=True)]


def item_of(tokens: np.ndarray, tokenizer: Tokenizer, line: Line, place: int, room: int | None) -> Item:
    """Return the row that shows a line, and where `place` is in it: alone, or with so much text around it
    that `room` tokens are shown."""
    more = 0 if room is None else room - (line.stop - line.start)
    first = max(0, line.start - more // 2)
    row = tokens[first : line.stop + more - (line.start - first)].tolist()
    return tokenizer.framed(row), place - first + len(tokenizer.begin)


@torch.inference_mode()
def surprise(model: MaskedLM, items: Sequence[Item], mask_id: int, pad_id: int) -> tuple[list, list]:
    """Mask each item's place alone. Return -log p(the token there) of each, and its rank among all tokens."""
    nll, rank = np.zeros(len(items)), np.zeros(len(items), dtype=int)
    order, device = sorted(range(len(items)), key=lambda n: len(items[n][0])), model.lm_head.weight.device
    for first in tqdm(range(0, len(items), ROWS), disable=None, leave=False):
        chosen = order[first : first + ROWS]
        rows, places = zip(*(items[n] for n in chosen), strict=True)
        ids = torch.full((len(rows), max(map(len, rows))), pad_id)
        real, each = torch.zeros_like(ids, dtype=torch.bool), torch.arange(len(rows))
        for number, row in enumerate(rows):
            ids[number, : len(row)], real[number, : len(row)] = torch.tensor(row), True
        labels = ids[each, list(places)].to(device)
        ids[each, list(places)] = mask_id
        hidden = model.model(ids.to(device), padding_mask=real.to(device))[each, list(places)]  # (N, C)
        logs = model.logits(hidden).double().log_softmax(dim=-1)
        right = logs.gather(1, labels[:, None])
        nll[chosen], rank[chosen] = -right[:, 0].cpu().numpy(), (logs > right).sum(dim=1).cpu().numpy()
    return nll.tolist(), rank.tolist()


def shares(ranks: Sequence[int]) -> str:
    """Return the shares of ranks 0 and below `MOST`, in percent."""
    return "".join(f"{100 * sum(rank < most for rank in ranks) / len(ranks):8.1f}" for most in (1, MOST))


def main():
    """Print one table for lines alone, and one for lines in their context."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path(DEFAULT_OUT) / final_name("MLM"), metavar="FILE")
    add("--count", type=int, default=200, metavar="N", help="lines (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of lines and tokens")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    if args.count < 1 or args.seed < 0:
        raise UserError("--count must be at least 1, and --seed at least 0")
    set_threads()
    model, tokenizer, config = load_encoder(args.checkpoint)
    model.to(pick_device(args.device))
    data, size = prepare_pretraining(config, tokenizer), tokenizer.vocab_size
    room = min(config.data.sequence_length, model.config.max_position_embeddings) - len(tokenizer.framed([]))
    lines = pick_lines(data.val, tokenizer, args.count, room, args.seed)
    print(f"{args.checkpoint}: {len(lines)} lines of held-out text, {len(data.train):,} tokens counted")
    print(f"one token of each line, and all of them, each masked alone: in percent, first or among {MOST}")
    one, two, three = (Counts(data.train, offsets, size) for offsets in ((), (-1,), (-2, -1)))
    both = Counts(data.train, (-1, 1), size)
    tables = {"unigram": [one], "trigram": [three, two, one], "two-sided": [both, three, two, one]}
    for view, shown in (("the line alone", None), (f"in a context of {room} tokens", room)):
        places = [(line, place) for line in lines for place in range(line.start, line.stop)]
        items = [item_of(data.val, tokenizer, line, place, shown) for line, place in places]
        asked = [number for number, (line, place) in enumerate(places) if place == line.target]
        nll, found = surprise(model, items, tokenizer.special_ids[MASK], tokenizer.pad_id)
        ranks = {name: [rank_of(some, *item) for item in items] for name, some in tables.items()}
        print(f"\n{view:32}  {len(asked):>6,} tokens     {len(items):>6,} tokens")
        for name, ranked in (ranks | {"the model": found}).items():
            print(f"{name:32}{shares([ranked[n] for n in asked])}{shares(ranked)}")
        print(f"pseudo-perplexity of the model {math.exp(sum(nll) / len(nll)):.2f}")


def rank_of(tables: Sequence[Counts], row: list[int], place: int) -> int:
    """Return the rank of the true token among the guesses of tables; `MOST` if it is not among them."""
    found = guesses(tables, row, place)
    return found.index(row[place]) if row[place] in found else MOST


if __name__ == "__main__":
    run_main(main)
