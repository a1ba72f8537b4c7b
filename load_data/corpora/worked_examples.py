"""Worked examples: `>>> expression` and its value, as an interpreter shows them.

This file builds every expression as a tree and derives both text and value from it, so text is never
evaluated. Reserved items (see `load_data/corpora/reserved.py`) are excluded, alone and inside larger
expressions.
"""

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from load_data.corpora.reserved import SMALL_SUM, is_reserved

EXAMPLES_PER_DOCUMENT = 16
LARGEST = 9999  # largest intermediate whole number
ATOM, PRODUCT, SUM, COMPARISON = 4, 3, 2, 1  # binding strength of an expression
WORDS = "apple bird blue cat code dog fish green hello list map moon name node open python red river sun tree"


@dataclass(frozen=True)
class Expression:
    """A Python expression and its value. `items` are the texts of it and its parts; none may be reserved."""

    text: str
    value: object
    strength: int = ATOM
    items: tuple[str, ...] = ()

    def within(self, strength: int) -> str:
        """Return the text, in parentheses if an operator of this `strength` would bind more tightly."""
        return self.text if self.strength >= strength else f"({self.text})"


def literal(value) -> Expression:
    """Return a literal value. It needs no computation, so there is nothing to reserve."""
    return Expression(repr(value), value)


def infix(left: Expression, sign: str, right: Expression) -> Expression:
    """Return `left sign right` for a sign of `INFIX`."""
    function, strength = INFIX[sign]
    # a - b - c groups from the left, so the right side needs parentheses sooner. Comparisons would chain.
    left_text = left.within(strength + (strength == COMPARISON))
    text = f"{left_text} {sign} {right.within(strength + 1)}"
    return Expression(text, function(left.value, right.value), strength, (*left.items, *right.items, text))


def applied(form: str, function: Callable, *parts: Expression) -> Expression:
    """Return `form`, such as `len({})`, with the texts of `parts`; its value is `function` of theirs."""
    text = form.format(*(part.text for part in parts))
    items = tuple(item for part in parts for item in part.items)
    return Expression(text, function(*(part.value for part in parts)), ATOM, (*items, text))


INFIX = {
    "+": (operator.add, SUM), "-": (operator.sub, SUM),
    "*": (operator.mul, PRODUCT), "//": (operator.floordiv, PRODUCT), "%": (operator.mod, PRODUCT),
    "<": (operator.lt, COMPARISON), "<=": (operator.le, COMPARISON), "==": (operator.eq, COMPARISON),
    "!=": (operator.ne, COMPARISON), ">": (operator.gt, COMPARISON), ">=": (operator.ge, COMPARISON),
}  # fmt: skip
TEXT_TO_TEXT = {
    "{}.upper()": str.upper, "{}.capitalize()": str.capitalize, "{}[::-1]": lambda text: text[::-1],
    "{} * 2": lambda text: text * 2, "{}[0]": lambda text: text[0], "{}[-1]": lambda text: text[-1],
}  # fmt: skip
TEXT_TO_NUMBER = {
    "len({})": len, "{}.count('e')": lambda text: text.count("e"), "{}.find('o')": lambda t: t.find("o"),
}  # fmt: skip
LIST_TO_ANY = {
    "len({})": len, "sum({})": sum, "max({})": max, "min({})": min, "sorted({})": sorted,
    "sorted({}, reverse=True)": lambda numbers: sorted(numbers, reverse=True),
    "{}[::-1]": lambda numbers: numbers[::-1],
    "{}[0]": lambda numbers: numbers[0], "{}[-1]": lambda numbers: numbers[-1],
}  # fmt: skip


def small_sum(rng: random.Random) -> Expression:
    """Return a + b or a - b. Each number has one digit half of the time, though there are fewer of those."""
    left, right = (literal(rng.randrange(rng.choice((10, 100)))) for _ in range(2))
    return infix(left, rng.choice("+-"), right)


def number(rng: random.Random, depth: int) -> Expression:
    """Return an expression for a whole number, at most `depth` levels deep."""
    if depth == 0 or rng.random() < 0.3:
        return literal(rng.randrange(rng.choice((10, 100))))
    left, right = number(rng, depth - 1), number(rng, depth - 1)
    signs = ["+", "-", "*"] if right.value == 0 else ["+", "-", "*", "//", "%"]
    result = infix(left, rng.choice(signs), right)
    return result if abs(result.value) <= LARGEST else left


def comparison(rng: random.Random) -> Expression:
    """Return a comparison of two numbers, sometimes negated or joined by `and`."""
    first = infix(number(rng, 1), rng.choice(["<", "<=", "==", "!=", ">", ">="]), number(rng, 1))
    kind = rng.randrange(4)
    if kind == 0:
        return applied("not {}", operator.not_, first)
    if kind == 1:
        other = literal(rng.random() < 0.5)
        return applied("{} and {}", operator.and_, first, other)
    return first


def about_text(rng: random.Random) -> Expression:
    """Return an expression about a word."""
    word = literal(rng.choice(WORDS.split()))
    kind = rng.randrange(4)
    if kind == 0:
        start = rng.randrange(3)
        stop = start + rng.randrange(1, 4)
        return applied(f"{{}}[{start}:{stop}]", lambda text: text[start:stop], word)
    if kind == 1:
        form, function = rng.choice(list(TEXT_TO_NUMBER.items()))
        return applied(form, function, word)
    if kind == 2:
        return infix(word, "+", literal(rng.choice(WORDS.split())))
    form, function = rng.choice(list(TEXT_TO_TEXT.items()))
    return applied(form, function, word)


def about_list(rng: random.Random) -> Expression:
    """Return an expression about a short list of numbers."""
    numbers = literal([rng.randrange(rng.choice((10, 100))) for _ in range(rng.randrange(1, 6))])
    kind = rng.randrange(4)
    if kind == 0:
        index = rng.randrange(len(numbers.value))
        return applied(f"{{}}[{index}]", lambda values: values[index], numbers)
    if kind == 1:
        one = literal(rng.choice([*numbers.value, rng.randrange(100)]))
        return applied("{} in {}", lambda value, values: value in values, one, numbers)
    form, function = rng.choice(list(LIST_TO_ANY.items()))
    return applied(form, function, numbers)


KINDS = (  # weight, and function that makes one
    (8, small_sum),
    (4, lambda rng: number(rng, 2)),
    (2, comparison),
    (3, about_text),
    (3, about_list),
)


def touches_reserved(expression: Expression) -> bool:
    """Return whether the expression, a part of it, or a small sum readable in its text is reserved."""
    return any(map(is_reserved, (*expression.items, *SMALL_SUM.findall(expression.text))))


def random_expression(rng: random.Random) -> Expression:
    """Return a random expression without reserved items."""
    weights, makers = zip(*KINDS, strict=True)
    while True:
        expression = rng.choices(makers, weights)[0](rng)
        if expression.items and not touches_reserved(expression):
            return expression


def worked_examples(count: int, seed: int = 0) -> Iterator[str]:
    """Yield `count` worked examples in documents of `EXAMPLES_PER_DOCUMENT`; a seed always gives the same."""
    rng = random.Random(seed)
    for first in range(0, count, EXAMPLES_PER_DOCUMENT):
        drawn = [random_expression(rng) for _ in range(min(EXAMPLES_PER_DOCUMENT, count - first))]
        yield "".join(f">>> {expression.text}\n{expression.value!r}\n" for expression in drawn)
