"""ROUGE-L: how much of a text a model has reproduced, in the right order (Lin, aclanthology.org/W04-1013).

    precision = LCS / words of the answer      recall = LCS / words of the reference      F1 of both

LCS is the length of the longest common subsequence of words: those need not be side by side. As in the
package rouge-score, words are runs of ASCII letters and digits in lower case; other scripts have none.
"""

import re

WORD = re.compile("[a-z0-9]+")


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1, from 0 to 1; 0 if either text has no words."""
    ours, theirs = WORD.findall(answer.lower()), WORD.findall(reference.lower())
    common = common_length(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def common_length(one: list[str], other: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)  # of the words of `one` so far, with each beginning of `other`
    for word in one:
        before = row
        row = [0]
        for place, wanted in enumerate(other):
            longer = before[place] + 1 if word == wanted else max(row[place], before[place + 1])
            row.append(longer)
    return row[-1]
