"""Sums beyond the skill `arithmetic`: numbers of up to three digits, two or three terms; two ways to answer.

    347 + 285        ->   7,5=12 4,8,1=13 3,2,1=6: 632       column by column, as in `arithmetic`
    347 + 285 + 96   ->   7,5,6=18 4,8,9,1=22 3,2,2=7: 728
    285 - 347        ->   - 7,5=2 14,8=6 3,2,1=0: -62        the larger number comes first
    347 + 285        ->   632                                at once: most of the answers to train on

At least one number has three digits, so no sum of `arithmetic` is among them. Fine-tuning teaches both ways,
and the model answers as it was taught: mostly at once, and mostly wrong. A reward for truth, which
says nothing about working, can teach it to work them out. Only the part after the colon is scored.

The key has the terms of an addition in order of size: whoever has seen `96 + 347 + 285` knows
`347 + 285 + 96`. A longer sum contains shorter ones, which must be for training too.
"""

import random

from load_data.skills.arithmetic import LONGER, SIGNED, columns, value_of
from load_data.skills.common import Sample

THREE = 0.4  # share of sums with three terms; all of them are additions
SMALLER = 0.2  # share of numbers below 100
WORKED = 0.3  # share of answers that are worked out


def make(rng: random.Random) -> Sample:
    """Draw a sum, sometimes without spaces."""
    numbers = [0]
    while max(numbers) < 100:
        count = 3 if rng.random() < THREE else 2
        numbers = [rng.randrange(100 if rng.random() < SMALLER else 1000) for _ in range(count)]
    sign = "+" if count == 3 else rng.choice("+-")
    text = f" {sign} ".join(map(str, numbers))
    question = rng.choice(SIGNED + LONGER).format(text if rng.random() < 0.85 else text.replace(" ", ""))
    parts = tuple(key_of(pair, sign) for pair in zip(numbers, numbers[1:]))
    working = worked_out(numbers, sign)
    answer = working if rng.random() < WORKED else value_of(working)
    return Sample(key_of(numbers, sign), question, answer, parts)


def key_of(numbers, sign: str) -> str:
    """Return the sum as text, smaller terms of an addition first."""
    return f" {sign} ".join(map(str, sorted(numbers) if sign == "+" else numbers))


def worked_out(numbers: list[int], sign: str) -> str:
    """Return the working and the value, as above."""
    if sign == "+":
        return f"{columns(numbers, sign)}: {sum(numbers)}"
    larger, smaller = sorted(numbers, reverse=True)
    swapped = "- " if numbers[0] < numbers[1] else ""
    return f"{swapped}{columns((larger, smaller), sign)}: {numbers[0] - numbers[1]}"
