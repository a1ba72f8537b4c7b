"""Worked examples against a real Python interpreter."""

import ast
import json
import re
import subprocess
import sys

import pytest

from load_data.corpora.reserved import is_reserved, item_key, unit_hash
from load_data.corpora.worked_examples import EXAMPLES_PER_DOCUMENT, infix, literal, worked_examples

EXAMPLE = re.compile(r">>> (.*)\n(.*)\n")


@pytest.fixture(scope="module")
def examples():
    """3000 pairs of expression and value, as text."""
    return EXAMPLE.findall("".join(worked_examples(3000)))


def test_python_gives_the_same_values(examples):
    code = "import json, sys; print(json.dumps([repr(eval(text)) for text in json.load(sys.stdin)]))"
    settings = {"input": json.dumps([text for text, _ in examples]), "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, "-c", code], check=True, **settings)
    assert json.loads(run.stdout) == [value for _, value in examples]


def test_documents_hold_whole_examples():
    size = EXAMPLES_PER_DOCUMENT
    documents = list(worked_examples(2 * size + 3))
    assert [len(EXAMPLE.findall(text)) for text in documents] == [size, size, 3]
    assert all(EXAMPLE.sub("", text) == "" for text in documents)
    assert list(worked_examples(0)) == []


def test_the_seed_decides():
    assert list(worked_examples(100)) == list(worked_examples(100))
    assert list(worked_examples(100)) != list(worked_examples(100, seed=1))


def parts(expression):
    """Every expression inside an expression that is worked out, by Python's own parser and printer."""
    worked_out = (ast.BinOp, ast.Compare, ast.Call, ast.Subscript, ast.BoolOp)
    nodes = ast.walk(ast.parse(expression, mode="eval"))
    return [ast.unparse(node) for node in nodes if isinstance(node, worked_out)]


def test_nothing_reserved_is_trained_on(examples):
    for expression, _ in examples:
        assert not is_reserved(expression)
        assert not any(map(is_reserved, parts(expression))), expression
        for left, sign, right in re.findall(r"(?<!\d)(\d{1,2}) ([+-]) (?=(\d{1,2})(?!\d))", expression):
            assert not is_reserved(f"{left} {sign} {right}"), expression


def test_a_tenth_is_reserved_and_spaces_do_not_matter():
    items = [f"{a} {sign} {b}" for a in range(100) for b in range(100) for sign in "+-"]
    share = sum(map(is_reserved, items)) / len(items)
    assert 0.09 < share < 0.11
    assert all(is_reserved(item) == is_reserved(item.replace(" ", "") + "\n") for item in items[:500])


def test_the_reserved_items_never_change():
    """Scores of models trained at different times are comparable only while this list stays what it is."""
    small = [f"{a} + {b}" for a in range(10) for b in range(10)]
    expected = ["0 + 2", "1 + 8", "1 + 9", "2 + 0", "2 + 3", "3 + 2", "8 + 1", "9 + 1"]
    assert [item for item in small if is_reserved(item)] == expected
    assert unit_hash("") == int("e3b0c44298fc", 16) / 2**48  # the published SHA-256 of nothing


def test_whoever_knows_a_sum_knows_it_in_either_order():
    """a + b and b + a are one item, and so are products; differences and longer expressions are not (D7)."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    for sign in "+*":
        assert all(is_reserved(f"{a} {sign} {b}") == is_reserved(f"{b}{sign}{a}") for a, b in pairs)
        assert 800 < sum(is_reserved(f"{a} {sign} {b}") for a, b in pairs) < 1200
    assert any(is_reserved(f"{a} - {b}") != is_reserved(f"{b} - {a}") for a, b in pairs)
    assert item_key("7+12 + 3") == "7+12+3" and item_key("12 + 7") == "7+12" and item_key("9*10") == "9*10"


def test_small_sums_are_well_covered(examples):
    sums = {text for text, _ in examples if re.fullmatch(r"\d{1,2} [+-] \d{1,2}", text)}
    assert len(sums) > 700
    one_digit = {f"{a} {sign} {b}" for a in range(10) for b in range(10) for sign in "+-"}
    trainable = {item for item in one_digit if not is_reserved(item)}
    everything = EXAMPLE.findall("".join(worked_examples(20_000)))
    assert trainable <= {text for text, _ in everything}


def test_the_kinds_all_occur(examples):
    text = "\n".join(expression for expression, _ in examples)
    pieces = ["//", " % ", " * ", "(", "not ", " and True", " == ", " <= ", " in ", "'cat' + '", ".upper()"]
    pieces += ["[::-1]", "[1:", "len(", "sorted(", "sum(", "max(", "min("]
    assert [piece for piece in pieces if piece not in text] == []


def test_parentheses_keep_the_tree():
    one, two, three = map(literal, (1, 2, 3))
    assert infix(one, "-", infix(two, "-", three)).text == "1 - (2 - 3)"
    assert infix(infix(one, "-", two), "-", three).text == "1 - 2 - 3"
    assert infix(infix(one, "+", two), "*", three).text == "(1 + 2) * 3"
    assert infix(one, "+", infix(two, "*", three)).text == "1 + 2 * 3"
    assert infix(infix(one, "<", two), "==", infix(two, "<", three)).text == "(1 < 2) == (2 < 3)"
    nested = infix(one, "*", infix(two, "-", three))
    assert nested.value == -1 and nested.items == ("2 - 3", "1 * (2 - 3)")
