"""ROUGE-L equals the package rouge-score; small cases by hand."""

import random

import pytest

from inference.generation.rouge import common_length, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat", "cat the", 0.5),  # one of two words, in either order
        ("Return the x, sorted.", "Return a sorted list of x", 2 * 2 / (4 + 6)),
        ("", "a", 0.0), ("a", "", 0.0), ("...", "...", 0.0), ("你好", "你好", 0.0),
    ],
)  # fmt: skip
def test_by_hand(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)


def test_the_longest_common_subsequence_is_the_longest():
    """All subsequences of the shorter text are tried."""

    def is_within(words, text):
        rest = iter(text)
        return all(word in rest for word in words)

    rng = random.Random(0)
    for _ in range(50):
        one, other = ([rng.choice("abc") for _ in range(rng.randint(0, 7))] for _ in range(2))
        chosen = ([word for place, word in enumerate(one) if which >> place & 1] for which in range(128))
        assert common_length(one, other) == max(len(words) for words in chosen if is_within(words, other))


def test_as_in_rouge_score():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer, rng = rouge_scorer.RougeScorer(["rougeL"]), random.Random(0)
    words = ["Return", "the", "a", "x_1", "list.", "of", "sorted", "don't", "naïve", "名前", "3.5", "-"]
    for _ in range(100):
        one, other = (" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(2))
        assert rouge_l(one, other) == pytest.approx(scorer.score(other, one)["rougeL"].fmeasure), (one, other)
