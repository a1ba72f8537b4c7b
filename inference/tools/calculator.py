"""A calculator for whole numbers: text -> tokens -> tree -> value. No text is ever given to `eval`.

    sum      product (("+" | "-") product)*          binds from the left: 9 - 4 - 3 is 2
    product  signed (("*" | "//" | "%") signed)*     // rounds down, as in Python
    signed   ("+" | "-") signed | number | "(" sum ")"

Each rule of the grammar is a method of `Parser`. Length, depth and the size of every number are bounded, so
no text takes more than a moment.
"""

import operator
import re

LONGEST = 200  # characters
DEEPEST = 20  # parentheses and signs around a number
LARGEST = 10**30  # of every number on the way
TOKEN = re.compile(r"[0-9]+|//|[-+*%()]")
SIGNS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod
}  # fmt: skip


class ToolError(ValueError):
    """A failure of a tool, in words for the model."""


def calculate(expression: str) -> str:
    """Return the value of `expression` as text. Raises `ToolError`."""
    return str(value_of(Parser(expression).tree))


def tokens_of(text: str) -> list[str]:
    """Cut `text` into numbers and signs."""
    if len(text) > LONGEST:
        raise ToolError(f"at most {LONGEST} characters, not {len(text)}")
    rest = TOKEN.sub("", text).split()
    if rest:
        raise ToolError(f"cannot read {rest[0]!r}: only whole numbers, + - * // % and parentheses")
    return TOKEN.findall(text)


class Parser:
    """Turn text into `tree`: a number, or (sign, left, right)."""

    def __init__(self, text: str):
        self.tokens, self.place, self.depth = tokens_of(text), 0, 0
        self.tree = self.sum()
        if self.next:
            raise ToolError(f"expected a sign before {self.next!r}")

    @property
    def next(self) -> str:
        """The next token, "" at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        """Return the next token and move on."""
        self.place += 1
        return self.tokens[self.place - 1]

    def chain(self, signs: tuple[str, ...], part):
        """Read parts with one of `signs` between them, from the left."""
        tree = part()
        while self.next in signs:
            tree = self.take(), tree, part()
        return tree

    def sum(self):
        """Read products that are added and subtracted."""
        return self.chain(("+", "-"), self.product)

    def product(self):
        """Read numbers that are multiplied and divided."""
        return self.chain(("*", "//", "%"), self.signed)

    def signed(self):
        """Read a number or a sum in parentheses, perhaps with signs before it."""
        if not self.next:
            raise ToolError("the expression ends too early")
        token, self.depth = self.take(), self.depth + 1
        if self.depth > DEEPEST:
            raise ToolError(f"more than {DEEPEST} parentheses and signs inside each other")
        if token in ("+", "-"):
            tree = token, 0, self.signed()
        elif token == "(":
            tree = self.sum()
            if not self.next == ")":
                raise ToolError("a parenthesis is not closed")
            self.take()
        elif token[0].isdigit():
            tree = int(token)
        else:
            raise ToolError(f"expected a number, not {token!r}")
        self.depth -= 1
        return tree


def value_of(tree) -> int:
    """Walk the tree."""
    if isinstance(tree, int):
        value = tree
    else:
        sign, left, right = tree[0], value_of(tree[1]), value_of(tree[2])
        if sign in ("//", "%") and right == 0:
            raise ToolError("division by zero")
        value = SIGNS[sign](left, right)
    if abs(value) > LARGEST:
        raise ToolError("a number has more than 30 digits")
    return value
