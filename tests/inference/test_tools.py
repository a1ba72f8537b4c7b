"""The tools that a model can call: right, bounded, and never a traceback, whatever the model writes."""

import json
import random

import pytest

from inference.tools import calculator, lookup
from inference.tools.calculator import LARGEST, LONGEST, ToolError, calculate
from inference.tools.calls import LONGEST_RESULT, run_call
from load_data.skills import docstrings

HOSTILE = [
    "", " ", "()", "1 +", "1 2", "(1", "1)", "* 3", "2 ** 3", "1 / 2", "1.5", "1e9", "0x10", "1_000", "x",
    "__import__('os').system('ls')", "1 if 1 else 2", "9" * 31, "10 ** 10 ** 10", "٣ + ²", "1 // 0",
    "5 % (2 - 2)", "(" * 99 + "1" + ")" * 99, "-" * 150 + "1", "1+" * 150 + "1", "9" * 20 + "*" + "9" * 20,
    "\x00", "1;2", "1,2", "[1]", "＋1", "1 + ",
]  # fmt: skip


def random_expression(rng, depth):
    """An expression, with signs, parentheses and spaces in every place where Python allows them."""
    space = " " * rng.choice((0, 0, 1, 2))
    if depth == 0 or rng.random() < 0.2:
        return space + str(rng.randrange(10 ** rng.randrange(1, 5)))
    kind = rng.random()
    if kind < 0.15:
        return space + rng.choice("+-") + random_expression(rng, depth - 1)
    if kind < 0.35:
        return f"{space}({random_expression(rng, depth - 1)}{space})"
    sign = rng.choice(("+", "-", "*", "//", "%"))
    return random_expression(rng, depth - 1) + space + sign + random_expression(rng, depth - 1)


def test_the_calculator_agrees_with_python():
    """On thousands of random expressions: value, order, rounding down, and division by zero."""
    rng, divided, seen = random.Random(0), 0, 0
    while seen < 4000:
        text = random_expression(rng, 4)
        if len(text) > LONGEST:
            continue
        seen += 1
        try:
            expected = eval(text.strip(), {"__builtins__": {}})
        except ZeroDivisionError:
            divided += 1
            with pytest.raises(ToolError, match="division by zero"):
                calculate(text)
            continue
        assert calculate(text) == str(expected), text
    assert divided > 20


@pytest.mark.parametrize("text, value", [
    ("9 - 4 - 3", "2"), ("100 // 7 // 2", "7"), ("-7 // 2", "-4"), ("-7 % 3", "2"), ("7 % -3", "-2"),
    ("2 * (3 + 4) * 5", "70"), ("--5", "5"), ("+".join("1" * 90), "90"),
    ("2*-3", "-6"), ("0007", "7"), (f"{LARGEST}", f"{LARGEST}"),
])  # fmt: skip
def test_known_values(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_an_error_in_words(text):
    with pytest.raises(ToolError) as error:
        calculate(text)
    assert 10 < len(str(error.value)) < 120
    result = run_call(json.dumps({"name": "calculator", "arguments": {"expression": text}}))
    assert result == f"error: {error.value}"


def test_random_letters_never_break_the_calculator():
    rng, read = random.Random(1), 0
    for _ in range(3000):
        text = "".join(rng.choice("0123456789+-*/%() \n.x") for _ in range(rng.randrange(30)))
        try:
            assert calculate(text) == str(eval(text.strip().replace("\n", " "), {"__builtins__": {}}))
            read += 1
        except ToolError:
            continue
        except SyntaxError:  # what Python does not read as we do: leading zeros
            assert any(one[0] == "0" and len(one) > 1 for one in calculator.tokens_of(text))
    assert read > 50


@pytest.mark.parametrize("text, error", [
    ("", "not JSON"), ("calculator(1 + 2)", "not JSON"), ('{"name": "calculator"', "not JSON"),
    ("[" * 900, "not JSON"), ("9" * 999, "a call is"), ("[1]", "a call is"), ("null", "a call is"),
    ('{"name": "calculator"}', "a call is"), ('{"name": "a", "arguments": {}, "x": 1}', "a call is"),
    ('{"name": "shell", "arguments": {"expression": "ls"}}', "no such tool; tools: calculator, lookup"),
    ('{"name": ["calculator"], "arguments": {}}', "no such tool"),
    ('{"name": "calculator", "arguments": "1 + 2"}', 'of calculator are {"expression": a text}'),
    ('{"name": "calculator", "arguments": {"expression": 12}}', "the arguments of calculator"),
    ('{"name": "calculator", "arguments": {"expression": "1", "x": "2"}}', "the arguments of calculator"),
    ('{"name": "lookup", "arguments": {"expression": "1"}}', 'the arguments of lookup are {"name": a text}'),
    ('{"name": "calculator", "arguments": {"expression": "%s"}}' % ("1" * 2000), "at most 1000 characters"),
])  # fmt: skip
def test_a_malformed_call_is_told_to_the_model(text, error):
    result = run_call(text)
    assert result.startswith("error: ") and error in result and len(result) <= LONGEST_RESULT


def test_a_call_runs():
    assert run_call('{"name": "calculator", "arguments": {"expression": "48213 * 77 - 912"}}') == "3711489"
    assert run_call('\n{"arguments": {"expression": "1+1"}, "name": "calculator"} ') == "2"


@pytest.fixture
def library(monkeypatch):
    """Two names that training reads, one that only scoring reads."""
    sides = {"train": [("textwrap.dedent", "Remove whitespace.", "textwrap.dedent(text)"),
                       ("a.dedent", "", "a.dedent()"), ("queue", "x" * 400, "")],
             "val": [("shlex.split", "Split it.", "")], "test": []}  # fmt: skip
    monkeypatch.setattr(lookup, "entries", lambda fraction: sides)
    lookup.known.cache_clear()
    yield
    lookup.known.cache_clear()


def test_the_lookup_reads_what_training_may_read(library):
    def ask(name):
        return run_call(json.dumps({"name": "lookup", "arguments": {"name": name}}))

    assert ask(" textwrap.dedent") == "textwrap.dedent(text) - Remove whitespace."
    assert ask("a.dedent") == "a.dedent()"
    assert ask("dedent") == "error: no such name; there is textwrap.dedent, a.dedent"
    assert ask("shlex.split") == ask("") == ask("os; rm") == "error: no such name"
    assert len(ask("queue")) == LONGEST_RESULT and ask("queue").endswith("...")


def test_an_installation_without_sources_is_told_too(monkeypatch):
    def missing(fraction):
        raise docstrings.UserError("no Python source files")

    monkeypatch.setattr(lookup, "entries", missing)
    lookup.known.cache_clear()
    assert run_call('{"name": "lookup", "arguments": {"name": "os"}}') == "error: no Python source files"
