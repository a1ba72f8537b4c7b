"""Arithmetic beyond the reach of a small model, left to the calculator:

    48213 * 77 - 912   ->   <tool_call>{"name": "calculator", "arguments": {"expression": ..}}</tool_call>
                            <tool_response>3711489</tool_response>   ->   3711489

    48213 * 77 - 912   ->   3711489                   at once: most of the answers to train on

The dialogue contains the call and its result, of which only the call and the answer are supervised. No model
of this size can answer at once, but it learns to pretend; a reward for true answers can teach it to call.
Plain fine-tuning does not train this skill. The key is the expression; values come from its tree.
"""

import random

from load_data.corpora.worked_examples import Expression, infix, literal
from load_data.skills.arithmetic import LONGER, SIGNED
from load_data.skills.common import Sample

CALLED = 0.2  # share of answers with a call
LEAST, DIGITS = 100, (3, 4, 5)  # no small sum, which would belong to `arithmetic`, can be read in one


def number(rng: random.Random) -> Expression:
    """Draw a number of three to five digits."""
    return literal(rng.randrange(LEAST, 10 ** rng.choice(DIGITS)))


def make(rng: random.Random) -> Sample:
    """Draw an expression of two or three numbers, and a question about it."""
    expression = infix(number(rng), rng.choice(("+", "-", "*", "//", "%")), number(rng))
    if rng.random() < 0.5:
        parts = [expression, number(rng)]
        rng.shuffle(parts)
        expression = infix(parts[0], rng.choice("+-*"), parts[1])
    value = str(expression.value)
    question = rng.choice(SIGNED + LONGER).format(expression.text)
    if rng.random() >= CALLED:
        return Sample(expression.text, question, value, expression.items)
    call = {"name": "calculator", "arguments": {"expression": expression.text}}
    return Sample(expression.text, question, value, expression.items, call=call, result=value)
