"""Recall documents: notes, and lines that repeat a note from far above. They teach a model to look back.

    # river maple
    def close(self):
    # garlic stone
        self.file.close()
    # river maple            the second word follows from the first note, and from nothing else

Plain text rarely needs one word from a thousand tokens ago, and a small model that reads only plain text does
not learn to look for it. Here the second word of every repeated note can be copied from above, and nothing
else predicts it (associative recall, arXiv 2312.04927; passkey retrieval, arXiv 2305.16300). Lists of notes
alone, many to a row, teach the skill; notes between the lines of source code teach the distance. Half of the
distances are spread evenly, half over their logarithm, so rows of any length have some that reach across.
"""

import random
from collections.abc import Iterator

REPEATED = 0.75  # share of the notes: with 0.5, and with 200 words, learning took twice as long
LISTS, LIST_LINES = 6000, 40
SHARE = 0.6  # of the source files, with notes between their lines
GAPS = (2, 6, 20)  # lines of code between notes, on average, one for each file
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

    A name that is noted again with another value has the new one from then on.
    """
    out, names, values = [], [], {}
    for line in lines:
        out.append(line)
        if line and not line.endswith("\n") or rng.randrange(gap):
            continue
        if names and rng.random() < REPEATED:
            back = rng.choice((1 + rng.randrange(len(names)), round(len(names) ** rng.random())))
            name = names[-back]  # half of the distances are uniform, half log-uniform
        else:
            name, values[name] = rng.choice(WORDS), rng.choice(WORDS)
            names.append(name)
        out.append(note(name, values[name]))
    return "".join(out)


def recall_documents(texts: list[str], seed: int = 0) -> Iterator[str]:
    """Yield lists of notes, and a share of `texts` with notes; a seed always gives the same."""
    rng = random.Random(seed)
    for _ in range(LISTS):
        yield with_notes([""] * LIST_LINES, 1, rng)
    for text in rng.sample(texts, round(len(texts) * SHARE)):
        yield with_notes(text.splitlines(keepends=True), rng.choice(GAPS), rng)
