"""Sums of three digits and three terms: the working is right column by column, and nothing leaks."""

import itertools
import random
import re

import pytest

from load_data.corpora.reserved import is_reserved
from load_data.skills import arithmetic, scored_items, sums, training_items
from load_data.skills.common import side_of

COLUMN = re.compile(r"(\d+(?:,\d+)*)=(\d+)")


def drawn(count):
    rng = random.Random(0)
    return [sums.make(rng) for _ in range(count)]


def terms(question):
    """The signed numbers of a question."""
    return [int(one) for one in re.findall(r"-?\d+", question.replace("- ", "-").replace(">>>", ""))]


def test_every_column_of_the_working_is_right():
    """The digits are those of the numbers, each column adds up, and the columns together give the value."""
    met, at_once = set(), 0
    for sample in drawn(6000):
        numbers = terms(sample.question)
        if ":" not in sample.answer:
            assert int(sample.answer) == sum(numbers)
            at_once += 1
            continue
        working, said = sample.answer.removeprefix("- ").split(": ")
        assert int(said) == sum(numbers) and (said[0] == "-") == sample.answer.startswith("- ")
        larger, *smaller = sorted(map(abs, numbers), reverse=True)
        sign = -1 if "-" in sample.question else 1
        columns, total, borrowed = working.split(" "), 0, False
        assert len(columns) == len(str(larger))
        for place, column in enumerate(columns):
            digits, result = COLUMN.fullmatch(column).groups()
            digits, result = [*map(int, digits.split(","))], int(result)
            assert result == (sum(digits) if sign == 1 else digits[0] - sum(digits[1:]))
            if place == 0:  # all units, in the order of the numbers, larger first in a difference
                order = [abs(one) for one in numbers] if sign == 1 else [larger, *smaller]
                assert [digit % 10 for digit in digits] == [number % 10 for number in order]
            own = [number // 10**place % 10 for number in (larger, *smaller)]
            if sign == 1:
                assert sum(digits) - sum(own) in (0, 1, 2)
            total += 10**place * (result if place == len(columns) - 1 else result % 10)
            borrowed = borrowed or digits[0] > 9
        assert total == abs(sum(numbers))
        met.add((len(numbers), sign, borrowed, said[0] == "-"))
    assert at_once / 6000 == pytest.approx(1 - sums.WORKED, abs=0.03)  # five standard deviations
    assert len(met) == 6  # two kinds of additions; differences with and without borrowing, of either sign


def test_the_examples_of_the_documentation():
    for module in (sums, arithmetic):
        shown = re.findall(r"^    (\S.*?) +-> +(.*?)(?:   .*)?$", module.__doc__, re.MULTILINE)
        assert len(shown) == 3 + (module is sums)
        for question, answer in shown:
            numbers, sign = [*map(int, re.findall(r"\d+", question))], "-" if "-" in question else "+"
            working = sums.worked_out(numbers, sign)
            assert answer == (working if ":" in answer else arithmetic.value_of(working))


def test_two_digits_are_worked_out_as_ever():
    """What the models of earlier versions have learned."""
    known = {(47, "+", 38): "7,8=15 4,3,1=8: 85", (51, "-", 25): "11,5=6 5,2,1=2: 26",
             (25, "-", 51): "- 11,5=6 5,2,1=2: -26", (3, "+", 9): "12", (40, "+", 0): "0,0=0 4=4: 40",
             (99, "+", 99): "9,9=18 9,9,1=19: 198"}  # fmt: skip
    for (left, sign, right), answer in known.items():
        assert arithmetic.worked_out(left, sign, right, left + right * (-1) ** (sign == "-")) == answer


def test_no_sum_of_the_skill_arithmetic_is_among_them():
    for sample in drawn(2000):
        numbers = terms(sample.question)
        assert max(map(abs, numbers)) >= 100 and max(map(abs, numbers)) <= 999 and len(numbers) in (2, 3)


def test_a_training_sum_contains_no_reserved_one():
    """Any order of an addition has the same side, and pairs within three terms are for training too."""
    longer = 0
    for item in itertools.islice(training_items(["sums"], 0), 3000):
        numbers, sign = [abs(one) for one in terms(item.messages[0]["content"])], "+"
        if "-" in item.messages[0]["content"]:
            assert not is_reserved(f"{numbers[0]} - {numbers[1]}")
            continue
        for some in [numbers] + [numbers[at : at + 2] for at in range(len(numbers) - 1)]:
            assert not is_reserved(" + ".join(map(str, sorted(some))))
        longer += len(numbers) == 3
        same = {sums.key_of(order, sign) for order in itertools.permutations(numbers)}
        assert len(same) == 1
    assert longer > 500


def test_about_a_tenth_is_held_out():
    sides = [side_of(sample) for sample in drawn(3000)]
    shares = {side: sides.count(side) / len(sides) for side in ("train", "val", "test")}
    assert 0.7 < shares["train"] < 0.9 and 0.03 < shares["val"] < 0.07 and 0.03 < shares["test"] < 0.07


def test_training_items_continue_where_they_were_left():
    names = ("sums", "lists")
    items = list(itertools.islice(training_items(names, 3), 40))
    assert list(itertools.islice(training_items(names, 3, start=15), 25)) == items[15:]
    assert list(itertools.islice(training_items(names, 4), 40)) != items
    assert {item.skill for item in items} == set(names)
    held_out = {item.messages[0]["content"] for item in scored_items("sums", 300, 0)}
    assert not held_out & {item.messages[0]["content"] for item in items}
