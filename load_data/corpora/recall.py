"""Recall documents: notes, and lines that repeat a note from far above. They teach a model to look back.

    # river maple
    def close(self):
    # garlic stone
        self.file.close()
    # river maple            the second word follows from the first note, and from nothing else

Plain text rarely needs one word from a thousand tokens ago, and a small model that reads only plain text does
not learn to look for it. Here the second word of every repeated note can be copied from above, and nothing
else predicts it (associative recall, arXiv 2312.04927; passkey retrieval, arXiv 2305.16300). Lists of notes
alone, many to a row, teach the skill; notes between the lines of source code teach the distance.

Trap: a far note must be as reliable as a near one. If names get other values later, or if documents
are so short that a row holds several with the same names, most far matches are wrong, and a model learns to
distrust them: it recalls less the longer its rows are (docs/experiments.md). So a name has one value in a
document, and documents are longer than rows.
"""

import random
from collections import deque
from collections.abc import Iterator
from itertools import cycle

REPEATED = 0.75  # share of the notes: with 0.5, and with 200 words, learning took twice as long
LISTS, LIST_LINES = 240, 1000
SHARE = 0.6  # of the source files, with notes between their lines
GAPS = (1, 3, 10)  # lines from note to note, on average, one for each file; 1 in lists
REACH, NEAREST = 48, 4  # most and fewest lines, about, from a note to where it is repeated
WORDS = """
acorn amber anchor arrow autumn bamboo banana basket bicycle biscuit blanket blossom bridge bucket butter
cactus camel candle canyon carpet castle cedar cherry chimney circus clover coconut copper coral cotton
cricket crystal curtain daisy desert dolphin donkey dragon eagle falcon feather fiddle forest fountain
galaxy garlic ginger glacier granite guitar hammer harbor honey island ivory jacket jungle kettle kitchen
ladder lagoon lantern lemon leopard lobster magnet maple marble meadow melon monkey mushroom needle oasis
ocean orchid otter palace panda parrot pebble pencil pepper piano pigeon planet pumpkin rabbit raven
ribbon river rocket saddle salmon silver spider squirrel summer tulip
""".split()  # noqa: SIM905  a list literal of these would fill two pages


def note(name: str, value: str) -> str:
    """Return the line of a note."""
    return f"# {name} {value}\n"


def question(name: str) -> str:
    """Return the beginning of a repeated note, which ends before its value."""
    return f"# {name}"


def with_notes(lines: list[str], gap: int, rng: random.Random) -> str:
    """Return `lines` with a note after every `gap` of them, on average; most repeat an earlier note.

    The notes that may be repeated are the last `kept` new ones. The distance from a note to its repetition
    is thus about `gap * kept` lines, a number whose logarithm is drawn evenly, and twice as much at times.
    """
    names = rng.sample(WORDS, len(WORDS))
    notes = cycle([note(name, rng.choice(WORDS)) for name in names])  # one value for each name
    kept = max(1, round(REACH / gap * (NEAREST / REACH) ** rng.random()))
    out, known = [], deque(maxlen=kept)
    for line in lines:
        out.append(line)
        if line and not line.endswith("\n") or rng.randrange(gap):
            continue
        if len(known) == kept and rng.random() < REPEATED:
            out.append(rng.choice(known))
        else:
            known.append(next(notes))
            out.append(known[-1])
    return "".join(out)


def recall_documents(texts: list[str], seed: int = 0) -> Iterator[str]:
    """Yield lists of notes, and a share of `texts` with notes; a seed always gives the same."""
    rng = random.Random(seed)
    for _ in range(LISTS):
        yield with_notes([""] * LIST_LINES, 1, rng)
    for text in rng.sample(texts, round(len(texts) * SHARE)):
        yield with_notes(text.splitlines(keepends=True), rng.choice(GAPS), rng)
