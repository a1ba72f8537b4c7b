"""Addition and subtraction of one- and two-digit numbers, worked out digit by digit:

    47 + 38   ->   7,8=15 4,3,1=8: 85          units; tens and what was carried; the result
    51 - 25   ->   11,5=6 5,2,1=2: 26          ten borrowed for the units, and given back by the tens
    25 - 51   ->   - 11,5=6 5,2,1=2: -26       the larger number comes first

A model that must answer `85` at once has to find the carry within one token. When the steps are written down,
each of them is a familiar one, and far fewer examples suffice (docs/experiments.md). Only the part after the
colon is scored. Sums of one-digit numbers have no working.

The key is the sum itself, `12 + 7` (or `7 + 12`, the same key), however the question is phrased: the worked
examples of pre-training exclude the same items. The digits of a column, as in `7,8=15`, are not an item:
every sum is made of them, and an unseen sum tests how columns are put together.
"""

import random

from load_data.skills.common import Sample
from load_data.corpora.worked_examples import infix, literal

# Share of one-digit numbers. There are few sums of them: drawn much more often, they would be memorised.
ONE_DIGIT = 0.3
SIGNED = ("{}", "{} =", "{}?", "{} = ?", ">>> {}", "What is {}?")
LONGER = ("How much is {}?", "Calculate {}.", "{} 等于多少？", "计算 {}")
WORDED = {
    "+": ("What is {} plus {}?", "{} plus {}", "{} 加 {} 等于多少？", "{} 加 {}"),
    "-": ("What is {} minus {}?", "{} minus {}", "{} 减 {} 等于多少？", "{} 减 {}"),
}


def make(rng: random.Random) -> Sample:
    """Draw a sum, in signs (sometimes without spaces) or in words."""
    left, right = (rng.randrange(10 if rng.random() < ONE_DIGIT else 100) for _ in range(2))
    sign = rng.choice("+-")
    total = infix(literal(left), sign, literal(right))
    form = rng.random()
    if form < 0.65:
        question = rng.choice(SIGNED).format(total.text)
    elif form < 0.75:
        question = rng.choice(SIGNED).format(f"{left}{sign}{right}")
    elif form < 0.88:
        question = rng.choice(LONGER).format(total.text)
    else:
        question = rng.choice(WORDED[sign]).format(left, right)
    return Sample(total.text, question, worked_out(left, sign, right, total.value))


def worked_out(left: int, sign: str, right: int, value: int) -> str:
    """Return the working and the value, as above."""
    if max(left, right) < 10:
        return str(value)
    if value < 0:
        return f"- {columns((right, left), sign)}: {value}"
    return f"{columns((left, right), sign)}: {value}"


def columns(numbers: tuple[int, ...], sign: str) -> str:
    """Return the columns of a sum, units first. A difference has two numbers, the larger one first.

    Above the units, digits that are 0 are left out. The last column shows all of its result.
    """
    working, carried, width = [], 0, len(str(max(numbers)))
    for place in range(width):
        first, *others = (number // 10**place % 10 for number in numbers)
        column = (first, *others, carried)
        if sign == "+":
            result = sum(column)
            carried = result // 10
        else:
            borrowed = first < sum(others) + carried
            column = (first + 10 * borrowed, *others, carried)
            result = first + 10 * borrowed - sum(others) - carried
            carried = int(borrowed)
        digits = [digit for digit in column if digit] or [0] if place else column[:-1]
        working.append(f"{','.join(map(str, digits))}={result}")
    return " ".join(working)


def value_of(answer: str) -> str:
    """Return the part of an answer that is scored: the value, without the working."""
    return answer.rsplit(":", 1)[-1].strip()
