"""Questions about Python's standard library, answered from its own docstrings and signatures:
``What does `textwrap.dedent` do?`` -> its first sentence; ``How is ... called?`` -> its signature.

The split is by file: files that pre-training reads are for training, its held-out files for `val` and
`test`. Most held-out answers can only be guessed from the name: a model of this size that scores far above
zero has seen them.
"""

import random
import re
from functools import cache

from load_data.corpora.python_corpus import docstring_documents, read_python_corpus
from load_data.corpora.reserved import holds_reserved_sum
from load_data.skills.common import SIDES, TRAIN, Sample, held_out_side
from utils.errors import UserError

MOST_WORDS = 20  # of a sentence
LONGEST_CALL = 60  # characters
LONGEST_NAME = 40
SENTENCE = re.compile(r"(.+?[.!?])(?=$|\s+[A-Z])")  # "i.e. that" ends no sentence
PURPOSES = ("What does `{}` do?", "What is `{}` for?", "Describe `{}`.", "`{}` 有什么用？")
CALLS = ("How is `{}` called?", "What is the signature of `{}`?", "How do I call `{}`?", "怎么调用 `{}`？")


@cache
def entries(val_fraction: float) -> dict[str, list[tuple[str, str, str]]]:
    """Return (name, first sentence or "", call or "") of everything public, by side; cached."""
    corpus = read_python_corpus(val_fraction)
    found = {side: [] for side in SIDES}
    for file in corpus.train:
        found[TRAIN] += filter(None, map(entry, docstring_documents(file)))
    for file in corpus.val:
        for one in filter(None, map(entry, docstring_documents(file))):
            found[held_out_side(one[0])].append(one)
    return found


def entry(document: str) -> tuple[str, str, str] | None:
    """Return (name, sentence, call) of a document of `docstring_documents`; None if private or too long."""
    heading, docstring = document.split("\n", maxsplit=1)
    name = heading.removeprefix("class ").removeprefix("module ").partition("(")[0]
    if len(name) > LONGEST_NAME or any(part.startswith("_") for part in name.split(".")):
        return None
    sentence = first_sentence(docstring)
    call = heading if heading.endswith(")") and len(heading) <= LONGEST_CALL else ""
    reserved = holds_reserved_sum(f"{sentence} {call}")
    return (name, sentence, call) if (sentence or call) and not reserved else None


def first_sentence(docstring: str) -> str:
    """Return the first sentence of the first paragraph on one line; "" if it has no end or is long."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    match = SENTENCE.match(paragraph)
    return match[1] if match and len(match[1].split()) <= MOST_WORDS else ""


def sample(rng: random.Random, side: str, val_fraction: float) -> Sample:
    """Draw a question about one entry."""
    if not (found := entries(val_fraction)[side]):
        raise UserError(
            f"data.val_fraction={val_fraction} leaves no {side} question for skill docstrings: raise it"
        )
    name, sentence, call = rng.choice(found)
    if call and (not sentence or rng.random() < 0.4):
        return Sample(f"call {name}", rng.choice(CALLS).format(name), call)
    return Sample(f"purpose {name}", rng.choice(PURPOSES).format(name), sentence)
