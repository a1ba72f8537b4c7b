"""Addition and subtraction of one- and two-digit numbers: `What is 12 + 7?` -> `19`.

The key is the sum itself, `12 + 7`, however it is asked for: the same items are left out of the worked
examples of pre-training.
"""

import random

from load_data.skills.common import Sample, Skill, by_side, is_exact
from load_data.worked_examples import small_sum

# Mostly short: a sum teaches through the two or three tokens of its answer, the rest is only read.
SIGNED = ("{}", "{} =", "{}?", "{} = ?", ">>> {}", "What is {}?")
LONGER = ("How much is {}?", "Compute {}.", "Calculate {}.", "{} 等于多少？", "{} = 多少？", "计算 {}")
WORDED = {
    "+": ("What is {} plus {}?", "{} plus {}", "Add {} and {}.", "{} 加 {} 等于多少？", "{} 加 {} 是几？"),
    "-": ("What is {} minus {}?", "{} minus {}", "{} 减 {} 等于多少？", "{} 减 {} 是几？"),
}


def make(rng: random.Random) -> Sample:
    """One sum, in signs (at times without spaces) or in words."""
    total = small_sum(rng)
    left, sign, right = total.text.split()
    form = rng.random()
    if form < 0.65:
        question = rng.choice(SIGNED).format(total.text)
    elif form < 0.75:
        question = rng.choice(SIGNED).format(left + sign + right)
    elif form < 0.88:
        question = rng.choice(LONGER).format(total.text)
    else:
        question = rng.choice(WORDED[sign]).format(left, right)
    return Sample(total.text, question, str(total.value))


SKILL = Skill(by_side(make), is_exact)
