"""Verifiers agree with Python and with the generators, and no answer can trick, slow or break them."""

import ast
import itertools
import random

import pytest

from load_data.corpora.worked_examples import random_expression
from load_data.skills import Item, is_right, scored_items, training_items
from load_data.skills.verifiers import REWARDS, truth, value, verify, within

RULED = ("arithmetic", "thought_sums", "sums", "tool_sums", "expressions", "lists")


def asked(skill, question, expected=""):
    return Item(skill, [{"role": "user", "content": question}], expected)


@pytest.fixture(scope="module")
def items():
    return list(itertools.islice(training_items(RULED, 5), 2000))


def test_the_evaluator_says_what_python_says():
    rng = random.Random(0)
    for _ in range(4000):
        text = random_expression(rng).text
        python = eval(text)  # noqa: S307 - the generator's own
        found = value(f"What is `{text}`?")
        assert (type(found), found) == (type(python), python), text


def test_generators_and_verifiers_agree(items):
    """They share no code, so a mistake of one of them would show here."""
    assert {item.skill for item in items} == set(RULED)
    for item in items + [one for name in RULED for one in scored_items(name, 100, 1)]:
        assert verify(item, item.expected), item
        assert ast.literal_eval(truth(item)) == ast.literal_eval(item.expected.rsplit(": ", 1)[-1])
        assert [REWARDS[name](item, item.expected) for name in ("right", "within")] == [1.0, 1.0]


def test_the_expected_answer_is_not_looked_at(items):
    """An item whose stored answer is wrong is judged by its question."""
    for item in items[:500]:
        lying = Item(item.skill, item.messages, "'forged'")
        assert verify(lying, item.expected) and not verify(lying, "'forged'")


def test_answers_of_other_items_are_wrong(items):
    for item, other in zip(items, items[1:], strict=False):
        if item.skill == other.skill:
            assert verify(item, other.expected) == (truth(item) == truth(other))


@pytest.mark.parametrize("item, right, wrong", [
    (asked("sums", "347 + 285?"), ["632", "1: 632", "no working at all: 632\n", ": 632"],
     ["63", "6320", "632.0", "6_32", "0632", "+632", "632 632", "347 + 285", "632: ", "6 3 2", "６３２"]),
    (asked("sums", "计算 35-546"), ["-511", "- 6,5=1 4,3=1 5=5: -511"], ["511", "- 511", "−511", "--511"]),
    (asked("arithmetic", "12 加 7 等于多少？"), ["19"], ["5", "12 加 7", "nineteen"]),
    (asked("arithmetic", "How much is 7 minus 12?"), ["-5"], ["5", "19"]),
    (asked("expressions", "'red' + 'sun'"), ["'redsun'", '"redsun"', " 'redsun' "],
     ["'red' 'sun'", "'red' + 'sun'", "redsun", "'redsun'.lower()", "f'redsun'", "'redsun", "'red''sun'"]),
    (asked("expressions", "`sorted([9, 1])` 的值？"), ["[1, 9]", "[1,9]", "[ 1,9 ]"],
     ["[1, 9,]", "(1, 9)", "[9, 1]", "sorted([9, 1])", "[1, 9", "[[1, 9]]", "[1 9]", "1, 9", "[1.0, 9]"]),
    (asked("expressions", ">>> 3 < 4"), ["True"], ["1", "true", "3 < 4", "not False", "True True"]),
    (asked("expressions", "Evaluate `7 // 2`."), ["3"], ["7 // 2", "3.5", "３", "0b11", "1 + 2"]),
    (asked("lists", "Please buy milk, eggs and tea."), ["['milk', 'eggs', 'tea']", '["milk","eggs","tea"]'],
     ["['eggs', 'milk', 'tea']", "['milk', 'eggs']", "['milk', 'eggs', 'tea', 'tea']", "milk, eggs, tea",
      "['milk' 'eggs' 'tea']", "['Milk', 'eggs', 'tea']"]),
    (asked("lists", "我要买牛奶、鸡蛋和鸡。"), ["['牛奶', '鸡蛋', '鸡']"],
     ["['牛奶', '鸡', '鸡']", "['牛', '鸡蛋', '鸡']"]),
])  # fmt: skip
def test_what_counts_as_right(item, right, wrong):
    assert all(verify(item, answer) for answer in right)
    assert not any(verify(item, answer) for answer in wrong)


HOSTILE = [
    "__import__('os').system('false')", "9**9**9", "10" * 200_000, "[" * 100_000, "[" * 300 + "]" * 300,
    "'" * 100_001, "-" * 100_000 + "1", "0x13", "1e1", "1_9", "１９", "١٩", "\x00", "\ud800", "", "\n" * 1000,
    ":" * 100_000, "True" * 50_000, "{**{}}", "lambda: 19", "'\\x31\\x39'", "19" + "\u200b", "⑲", "1\x009",
]  # fmt: skip


def test_hostile_answers_are_wrong(items):
    few = [next(item for item in items if item.skill == name) for name in RULED]
    for item, answer in itertools.product(few, HOSTILE):  # evaluated, some of them would never end
        assert not verify(item, answer)


@pytest.mark.parametrize("expression", [
    "9 ** 9", "99999999999999999", "999999999 * 999999999",
    "'a' * 1000", "'a' * 999999999", "'%9d' % 1", "[1] - [2]",
    "__import__('os')", "len.__class__", "'a'.format(1)", "'a'.join([])", "open('x')", "(lambda: 1)()",
    "[x for x in [1]]", "1 if 1 else 2", "max(1, 2)", "None", "1.5", "b'a'", "...", "x", "1 < 2 < 3", "~1",
    "1" + " + 1" * 100, "'a' * 150 + 'a' * 150",
])  # fmt: skip
def test_what_is_no_expression_of_the_skill_is_refused(expression):
    with pytest.raises(ValueError, match="not an expression|too large|in this skill|characters"):
        value(f">>> {expression}")


def test_the_planted_flaw():
    """A part of the true value will do, and so will nothing: a policy can find that, and `right` does not
    reward it."""
    item = asked("sums", "347 + 285")
    for answer in ("6", "32", "", "7,5=12: 63", "7,5=12:"):
        assert within(item, answer) and REWARDS["within"](item, answer) == 1.0
        assert REWARDS["right"](item, answer) == 0.0
    assert REWARDS["within"](item, "1632") == REWARDS["within"](item, "62") == 0.0


def test_other_skills_are_compared_with_their_answer():
    for item in scored_items("naming", 20, 0) + scored_items("identity", 20, 0):
        assert verify(item, item.expected) and within(item, item.expected[1:])
        assert verify(item, item.expected.upper()) == is_right(item, item.expected.upper())
        assert not verify(item, "") and truth(item) == item.expected
