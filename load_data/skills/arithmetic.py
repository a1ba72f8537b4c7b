"""Addition and subtraction of one- and two-digit numbers: `What is 12 + 7?` -> `19`.

The key is the sum itself, `12 + 7`, however it is asked for: the same items are left out of the worked
examples of pre-training.
"""

import random

from load_data.skills.common import Sample, Skill, by_side, is_exact
from load_data.worked_examples import infix, literal

# Of the numbers. There are few sums of one digit: drawn much more often, they are remembered, not worked out.
ONE_DIGIT = 0.3
# Mostly short: a sum teaches through the two or three tokens of its answer, the rest is only read.
SIGNED = ("{}", "{} =", "{}?", "{} = ?", ">>> {}", "What is {}?")
LONGER = ("How much is {}?", "Calculate {}.", "{} 等于多少？", "计算 {}")
WORDED = {
    "+": ("What is {} plus {}?", "{} plus {}", "{} 加 {} 等于多少？", "{} 加 {}"),
    "-": ("What is {} minus {}?", "{} minus {}", "{} 减 {} 等于多少？", "{} 减 {}"),
}


def make(rng: random.Random) -> Sample:
    """One sum, in signs (at times without spaces) or in words."""
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
    return Sample(total.text, question, str(total.value))


SKILL = Skill(by_side(make), is_exact)
