"""Byte-pair encoding by hand, for reading: the same merges and ids as the `tokenizers` library.

    training   pair* = argmax over pairs (a, b) of count(a b);  every "a b" of pair* becomes "ab";  repeat
    encoding   merge the adjacent pair whose merge was learned first;  repeat

The method is that of Sennrich et al. (arXiv 1508.07909). They start from characters; GPT-2 starts from the
256 bytes of UTF-8, so nothing is ever unknown. Merges never cross the pieces that `SPLIT_PATTERN` cuts. Of
equally frequent pairs, the one with the lowest ids wins (left id first), as in the library.

All pairs are counted again for every merge. Real runs use the library, which only updates the counts that
change and is far faster: tokenization/train_tokenizer.py.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

from collections import Counter
from itertools import pairwise

from load_data.tokenization.tokenizer import PART_TOKENS, SPECIAL_TOKENS, SPLIT_PATTERN, byte_characters
from load_data.tokenization.tokenizer import split_and_spell

Pair = tuple[str, str]
SPECIAL = len(SPECIAL_TOKENS) + len(PART_TOKENS)


def pieces_of(text: str) -> list[str]:
    """Cut `text` by `SPLIT_PATTERN` and spell every byte as one visible character."""
    return [piece for piece, _ in split_and_spell(SPLIT_PATTERN).pre_tokenize_str(text)]


def train(text: str, vocab_size: int) -> list[Pair]:
    """Return the merges, in order, for a vocabulary of `vocab_size` ids; fewer if no pair occurs twice."""
    words = [(list(piece), count) for piece, count in Counter(pieces_of(text)).items()]
    ids, merges = vocabulary([]), []
    while SPECIAL + len(ids) < vocab_size:
        counts = Counter()
        for tokens, count in words:
            for pair in pairwise(tokens):
                counts[pair] += count
        best = max(counts, key=lambda pair: (counts[pair], -ids[pair[0]], -ids[pair[1]]), default=None)
        if counts[best] < 2:
            break
        merges.append(best)
        ids.setdefault("".join(best), len(SPECIAL_TOKENS) + len(ids))
        for tokens, _ in words:
            merge_all(tokens, best)
    return merges


def merge_all(tokens: list[str], pair: Pair) -> None:
    """Merge every occurrence of `pair` in `tokens`, from left to right, in place."""
    place = 0
    while place < len(tokens) - 1:
        if (tokens[place], tokens[place + 1]) == pair:
            tokens[place : place + 2] = ["".join(pair)]
        place += 1


def vocabulary(merges: list[Pair]) -> dict[str, int]:
    """Return the id of each token: after those that mark turns come the bytes, then one per merge."""
    tokens = dict.fromkeys([*sorted(byte_characters()), *map("".join, merges)])
    return {token: number for number, token in enumerate(tokens, start=len(SPECIAL_TOKENS))}


def encode(text: str, merges: list[Pair]) -> list[int]:
    """Return the ids of `text`."""
    ids, rank = vocabulary(merges), {pair: number for number, pair in enumerate(merges)}
    found = []
    for piece in pieces_of(text):
        tokens = list(piece)
        while (ranks := [rank.get(pair, len(rank)) for pair in pairwise(tokens)]) and min(ranks) < len(rank):
            place = ranks.index(min(ranks))  # the leftmost, if there are several
            tokens[place : place + 2] = ["".join(tokens[place : place + 2])]
        found += [ids[token] for token in tokens]
    return found


def lesson():
    """Train on the source of the standard library's `textwrap`, and encode one line with ever more merges."""
    import textwrap

    text = pathlib.Path(textwrap.__file__).read_text(encoding="utf-8")
    line = "    return wrapper.fill(text)  # 你好"
    print(f"{len(text):,} characters of textwrap.py; Ġ is a space, Ċ a line break; training 400 merges\n")
    merges = train(text, len(vocabulary([])) + SPECIAL + 400)
    for number in (0, 1, 2, 3, 10, 30, 100, 300):
        print(f"merge {number:3}: {merges[number]}")
    names = {one: token for token, one in vocabulary(merges).items()}
    print(f"\n{line}\nmerges  tokens")
    for count in (0, 10, 50, 400):
        ids = encode(line, merges[:count])
        print(f"{count:6}  {len(ids):2}: {'|'.join(names[one] for one in ids)}")


if __name__ == "__main__":
    lesson()
