"""Questions that can be answered only with a line from far above, at a chosen depth of a held-out text.

    passkey  `# river maple` somewhere in code, at the end `# river`: the second word (arXiv 2305.16300)
    keys     the same with OTHERS more such lines at random places, so that the name decides
    names    the definition of a function or class of held-out code, taken from its file; at the end
             `    return ` and the first token of its name: the rest of the name

    row: filler | the line, at depth x (0 start, 1 end) | filler | question | answer       T tokens in all

The filler is held-out text that ends with a line. No name is asked for that stands in its filler by itself.
"""

import random
import re
from dataclasses import dataclass

import numpy as np

from load_data.corpora.recall import WORDS, note, question
from load_data.tokenization.tokenizer import Tokenizer
from utils.errors import UserError

OTHERS = 7  # more notes in the task `keys`
TASKS = ("passkey", "keys", "names")
DEFINITION = re.compile(r"^(?:def|class) (\w{6,})[(:].*\n", re.MULTILINE)
SHORTEST_REST = 2  # tokens of a name that have to be recalled


@dataclass(frozen=True)
class Item:
    """A question: the line to find, other lines to place anywhere, the end of the row, and the answer."""

    line: list[int]
    others: list[list[int]]
    question: list[int]
    answer: list[int]
    name: str


class Haystack:
    """Held-out text, and the rows that are made of it.

    Args:
        tokens: (N,) ids of held-out text.
        tokenizer: the model's.
    """

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer):
        self.tokens, self.tokenizer = np.asarray(tokens, dtype=np.int64), tokenizer
        ends = np.array([tokenizer.decode([one]).endswith("\n") for one in range(tokenizer.vocab_size)])
        self.line_starts = np.flatnonzero(ends[self.tokens]) + 1
        self.definitions = self.find_definitions(tokenizer.decode(self.tokens.tolist()))

    def find_definitions(self, text: str) -> list[tuple[str, str]]:
        """Return (name, line) of each function and class whose name is long enough, once each."""
        found = {match[1]: match[0] for match in DEFINITION.finditer(text)}
        return [(name, line) for name, line in found.items() if len(self.cut(name)[1]) >= SHORTEST_REST]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that does not end the document."""
        return self.tokenizer.encode_open([text])[0]

    def cut(self, name: str) -> tuple[list[int], list[int]]:
        """Return the ids of `    return `, up to the first token of `name`, and those of the rest of it."""
        start = self.tokenizer.encode("    return")
        ids = self.tokenizer.encode(f"    return {name}(")
        return ids[: len(start) + 1], ids[len(start) + 1 : -1]

    def item(self, task: str, rng: random.Random) -> Item:
        """Return a random item of `task`. Raises `UserError` if the text has no definition for `names`."""
        encode = self.encode
        if task == "names":
            if not self.definitions:
                raise UserError("--tasks names: no function or class in the held-out text has a long name")
            name, line = rng.choice(self.definitions)
            return Item(encode(line), [], *self.cut(name), name)
        name, *others = rng.sample(WORDS, 1 + OTHERS if task == "keys" else 1)
        value = rng.choice(WORDS)
        lines = [encode(note(other, rng.choice(WORDS))) for other in others]
        return Item(encode(note(name, value)), lines, encode(question(name)), encode(" " + value), name)

    def row(self, item: Item, length: int, depth: float, rng: random.Random) -> list[int]:
        """Return the row of `item`, exactly `length` ids, with its line at `depth`.

        Raises `UserError` if the held-out text, or `length`, is too short.
        """
        given = [item.line, *item.others, item.question, item.answer]
        room = length - sum(map(len, given))
        stops = self.line_starts[self.line_starts >= max(room, 0)]
        if room < 1 or not len(stops):
            raise UserError(f"no row of {length} tokens: {len(self.tokens)} of held-out text, {room} to fill")
        for _ in range(100):  # fillers; a name may be too frequent to be absent from any
            start = int(rng.choice(stops)) - room
            if item.name not in self.tokenizer.decode(self.tokens[start : start + room].tolist()):
                break
        places = self.line_starts - start
        places = [0, *places[(places > 0) & (places <= room)].tolist()]
        lines = [(min(places, key=lambda place: abs(place - depth * room)), item.line)]
        lines += [(rng.choice(places), other) for other in item.others]
        out, done = [], 0
        for place, line in sorted(lines):
            out += self.tokens[start + done : start + place].tolist() + line
            done = place
        return out + self.tokens[start + done : start + room].tolist() + item.question + item.answer
