"""Small Python expressions and their values: ``What is `len('apple')`?`` -> `5`.

The expressions of `load_data/corpora/worked_examples.py`, with their own reserved items, less the sums of
two small
numbers, which are `arithmetic`. The value comes from the expression's tree; nothing is evaluated from text.
"""

import random
import re

from load_data.skills.common import Sample, Skill, by_side, is_exact
from load_data.corpora.worked_examples import KINDS, small_sum

FORMS = (">>> {}", "{}", "What is `{}`?", "Evaluate `{}`.", "What does `{}` give?", "`{}` 的值？")
ARITHMETIC = re.compile(r"\d{1,2} [+-] \d{1,2}")
OTHER_KINDS = [(weight, kind) for weight, kind in KINDS if kind is not small_sum]


def make(rng: random.Random) -> Sample:
    """One expression in one of its forms."""
    weights, kinds = zip(*OTHER_KINDS, strict=True)
    expression = rng.choices(kinds, weights)[0](rng)
    while not expression.items or ARITHMETIC.fullmatch(expression.text):
        expression = rng.choices(kinds, weights)[0](rng)
    question = rng.choice(FORMS).format(expression.text)
    return Sample(expression.text, question, repr(expression.value), expression.items)


SKILL = Skill(by_side(make), is_exact)
