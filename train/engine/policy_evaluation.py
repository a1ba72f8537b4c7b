"""Evaluation of a policy on held-out questions of skills, judged by their verifiers.

    val_greedy   share of questions with a right greedy answer
    val_pass1    share of right samples, drawn at the temperature of training
    val_pass8    share of questions that at least one of 8 samples answers: what there is to learn from
    val_reward   mean reward of the samples; apart from val_pass1 where the reward is not the truth
    val_length   mean length of a sample in tokens, its end included
    val_calls    mean number of calls of tools in a sample

With several skills, `val_greedy_sums` and the like are those of one skill. Every sample has a seed of its
own, made from the run's seed, its question and its number, so an evaluation is repeatable, and the same for
any number of processes.
"""

import math
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path

from config.rl import RLConfig
from inference.generation.conversation import prompt_within
from inference.generation.exchange import PLAIN, Request
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, row_seed
from load_data.chat.chat_template import END, ChatTemplate
from load_data.skills import HELD_OUT, Item, scored_items
from load_data.skills.common import VAL
from load_data.skills.verifiers import truth, verify
from train.engine.answer_rows import Judge, Row, answered
from utils.distributed import World, sum_scalars

BATCH = 16  # questions that are answered together
SAMPLES = 8  # of each question
MEASURES = ("greedy", "pass1", "pass8", "reward", "length", "calls")
SHOWN = 20  # questions of the file of sampled answers


class PolicyEvaluation:
    """`evaluation(model, max_batches)` -> the numbers above; None measures all questions.

    Args:
        items: the questions (`held_out_items`), the same in every process.
        judge: (questions, answers) -> the reward of each answer, that of `Rollouts`.
        policy_of: model -> the policy, where the engine's model holds more than that (a critic).
    """

    def __init__(
        self, items: list[Item], template: ChatTemplate, rl: RLConfig, judge: Judge, world: World,
        seed: int = 0, policy_of: Callable = lambda model: model, request: Request = PLAIN,
    ):  # fmt: skip
        self.items, self.template, self.rl, self.judge = items, template, rl, judge
        self.world, self.seed, self.policy_of = world, seed, policy_of
        self.request = request
        self.batches = math.ceil(len(items) / (BATCH * world.size))  # of each process, rounded up

    def __call__(self, model, max_batches: int | None) -> dict[str, float]:
        """Sum over the questions of this process, then over all processes."""
        skills = sorted({item.skill for item in self.items})
        sums = {skill: [0.0] * (1 + len(MEASURES)) for skill in skills}
        mine = range(BATCH * self.world.rank, len(self.items), BATCH * self.world.size)
        for first in mine[:max_batches]:
            numbers = range(first, min(first + BATCH, len(self.items)))
            greedy = self.answers(model, numbers, 0.0, 1)
            drawn = self.answers(model, numbers, self.rl.temperature, SAMPLES)
            for number, (best,), several in zip(numbers, greedy, drawn, strict=True):
                item = self.items[number]
                right = sum(verify(item, row.text) for row in several)
                reward = sum(self.judge([item] * SAMPLES, several)) / SAMPLES
                length = sum(row.length for row in several) / SAMPLES
                calls = sum(row.calls for row in several) / SAMPLES
                shares = [verify(item, best.text), pass_at(1, right), pass_at(8, right)]
                values = [1, *shares, reward, length, calls]
                sums[item.skill] = [one + value for one, value in zip(sums[item.skill], values, strict=True)]
        flat = sum_scalars(list(chain(*sums.values())))
        rows = [flat[at : at + len(MEASURES) + 1] for at in range(0, len(flat), len(MEASURES) + 1)]
        results = means("", map(sum, zip(*rows, strict=True)))
        if len(skills) > 1:
            for skill, row in zip(skills, rows, strict=True):
                results |= means(f"_{skill}", row)
        return results

    def answers(self, model, numbers: range, temperature: float, samples: int) -> list[list[Row]]:
        """Return the answers to each of the questions `numbers`."""
        generator = Generator(self.policy_of(model), self.template.tokenizer.eos_id, fast=False)
        params = SamplingParams(temperature, max_new_tokens=self.rl.max_new_tokens)
        room = generator.room(params.max_new_tokens)
        asked, think = [self.items[number].messages for number in numbers], self.request.thinking
        prompts = [prompt_within(self.template, messages, room, think) for messages in asked]
        seeds = [row_seed(self.seed, number, sample) for number in numbers for sample in range(samples)]
        rows = answered(generator, self.template, prompts, params, self.request, seeds)
        return [rows[at : at + samples] for at in range(0, len(rows), samples)]

    def sampled(self, model) -> list[Row]:
        """Return one sampled answer to each of the first questions, for `write_side_by_side`."""
        numbers = range(min(SHOWN, len(self.items)))
        return [row for (row,) in self.answers(model, numbers, self.rl.temperature, 1)]

    def write_side_by_side(self, path: Path, before: list[Row], after: list[Row]) -> None:
        """Write each question, its true answer, and what was sampled before and after training."""
        lines = []
        for item, *answers in zip(self.items, before, after):
            lines.append(f"question  {item.messages[-1]['content']}\ntrue      {truth(item)}\n")
            for name, row in zip(("before", "after"), answers):
                mark = "right" if verify(item, row.text) else "wrong"
                answer = self.template.tokenizer.decode(row.answer, skip_special=False).removesuffix(END)
                lines.append(f"{name:9} {mark}  {answer!r}\n")
            lines.append("\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")


def held_out_items(names, count: int, val_fraction: float = HELD_OUT) -> list[Item]:
    """Return `count` validation items of each skill, or all it has, the skills taking turns. They are never
    those of inference/evaluate.py: the weights that do best here are kept, and then scored there."""
    columns = zip_longest(*(scored_items(name, count, 0, val_fraction, VAL) for name in names))
    return [item for row in columns for item in row if item is not None]


def pass_at(k: int, right: int, drawn: int = SAMPLES) -> float:
    """Return the probability that k of the `drawn` samples, of which some are right, have a right one
    (arXiv 2107.03374): the unbiased estimate of pass@k."""
    return 1.0 - math.comb(drawn - right, k) / math.comb(drawn, k)


def means(suffix: str, row) -> dict[str, float]:
    """Return the measures of a row of sums; the first is the number of questions."""
    count, *totals = row
    return {f"val_{name}{suffix}": value / max(count, 1) for name, value in zip(MEASURES, totals)}
