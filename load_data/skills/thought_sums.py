"""Sums of the skill `arithmetic`, with its working as thinking, or without any:

    47 + 38   ->   <think>7,8=15 4,3,1=8</think>85        half of the dialogues: the request asks for thinking
    47 + 38   ->   85                                     the other half

The model learns both, and the request decides. The items are those of `arithmetic`, on the same sides.
"""

import random
from dataclasses import replace

from load_data.skills import arithmetic
from load_data.skills.common import Sample


def make(rng: random.Random) -> Sample:
    """Draw a sum. One of one-digit numbers has no working, and so an empty thought."""
    sample = arithmetic.make(rng)
    working, _, value = sample.answer.rpartition(": ")
    return replace(sample, answer=value, thinking=working if rng.random() < 0.5 else None)
