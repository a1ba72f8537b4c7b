"""Small Python expressions and their values: ``What is `len('apple')`?`` -> `5`.

The expressions of `load_data/corpora/worked_examples.py`, with their own reserved items, except for sums of
two small numbers, which belong to `arithmetic`. Values come from the tree; text is never evaluated.
"""

import random
import re

from load_data.skills.common import Sample
from load_data.corpora.worked_examples import KINDS, small_sum

FORMS = (">>> {}", "{}", "What is `{}`?", "Evaluate `{}`.", "What does `{}` give?", "`{}` 的值？")
ARITHMETIC = re.compile(r"\d{1,2} [+-] \d{1,2}")
OTHER_KINDS = [(weight, kind) for weight, kind in KINDS if kind is not small_sum]


def make(rng: random.Random) -> Sample:
    """Draw an expression in one of the forms of a question."""
    weights, kinds = zip(*OTHER_KINDS, strict=True)
    expression = rng.choices(kinds, weights)[0](rng)
    while not expression.items or ARITHMETIC.fullmatch(expression.text):
        expression = rng.choices(kinds, weights)[0](rng)
    question = rng.choice(FORMS).format(expression.text)
    return Sample(expression.text, question, repr(expression.value), expression.items)
