"""The evaluation of a policy: its estimators, its repeatability, and what it writes."""

import itertools
import math
import random

import pytest
import torch

from config.rl import RLConfig
from inference.generation.generator import Answer
from load_data.chat.chat_template import ChatTemplate
from load_data.skills import scored_items
from load_data.skills.verifiers import REWARDS, truth, verify
from tests.inference.tools import byte_tokenizer, tiny_model
from train.engine import policy_evaluation
from train.engine.policy_evaluation import PolicyEvaluation, held_out_items, pass_at
from utils.distributed import World

RL = RLConfig(temperature=0.9, max_new_tokens=6)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(policy_evaluation, "BATCH", 2)


def evaluation(items, world=None, seed=0, reward="right", rl=RL, **settings):
    template = ChatTemplate(byte_tokenizer())
    return PolicyEvaluation(items, template, rl, REWARDS[reward], world or World(), seed, **settings)


class Scripted:
    """A generator that knows the questions: it writes `answer(question, sample)`, and nothing else."""

    def __init__(self, answer):
        self.answer, self.context = answer, 512

    def __call__(self, model, start_id, fast):
        return self

    def room(self, max_new_tokens):
        return 400

    def generate(self, prompts, params, stop_ids, samples, seeds):
        tokenizer, rows = byte_tokenizer(), []
        for prompt, sample in itertools.product(prompts, range(samples)):
            question = tokenizer.decode(prompt)
            text = self.answer(question, None if params.temperature == 0 else sample)
            rows.append(Answer([*tokenizer.encode(text), min(stop_ids)]))
        return rows


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for drawn in range(1, 9):
        for right, k in itertools.product(range(drawn + 1), range(1, drawn + 1)):
            subsets = list(itertools.combinations(range(drawn), k))
            found = sum(any(one < right for one in subset) for subset in subsets)
            assert pass_at(k, right, drawn) == pytest.approx(found / len(subsets), abs=1e-12)


def test_every_number_against_a_count_by_hand(monkeypatch):
    """Each question has a number of right samples of its own, and its greedy answer is right or not."""
    items = held_out_items(["sums", "expressions"], 5)
    rng = random.Random(0)
    plan = {item.messages[0]["content"]: (rng.randrange(9), rng.random() < 0.5, item) for item in items}

    def answer(prompt, sample):
        right, greedy, item = max((one for one in plan.items() if one[0] in prompt), key=lambda one: len(one[0]))[1]
        good = greedy if sample is None else sample < right
        return truth(item) if good else "wrong" * (sample or 1)

    monkeypatch.setattr(policy_evaluation, "Generator", Scripted(answer))
    found = evaluation(items, reward="contains")(None, None)
    for skill in ("", "_sums", "_expressions"):
        rows = [one for one in plan.values() if one[2].skill in skill or not skill]
        assert found[f"val_greedy{skill}"] == sum(greedy for _, greedy, _ in rows) / len(rows)
        assert found[f"val_pass1{skill}"] == pytest.approx(sum(right for right, *_ in rows) / 8 / len(rows))
        assert found[f"val_pass8{skill}"] == sum(right > 0 for right, *_ in rows) / len(rows)
        lengths = [len(truth(item).encode()) + 1 if n < right else 5 * (n or 1) + 1
                   for right, _, item in rows for n in range(8)]  # fmt: skip
        assert found[f"val_length{skill}"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["val_reward"] == found["val_pass1"]  # here the flawed reward finds no more
    assert list(found)[:5] == ["val_greedy", "val_pass1", "val_pass8", "val_reward", "val_length"]


def test_the_reward_may_differ_from_the_truth(monkeypatch):
    """An answer that lists many values is wrong, though the planted verifier rewards it."""
    items = held_out_items(["sums"], 3)
    monkeypatch.setattr(
        policy_evaluation, "Generator",
        Scripted(lambda prompt, sample: " ".join(truth(item) for item in items) + " 1"),
    )  # fmt: skip
    found = evaluation(items, reward="contains")(None, None)
    assert found["val_reward"] == 1.0 and found["val_pass1"] == found["val_greedy"] == 0.0
    assert len(found) == 5  # one skill: its numbers are those of all


def test_an_evaluation_is_repeatable_and_depends_on_the_seed():
    model = tiny_model(1)
    items = held_out_items(["lists"], 3)
    torch.manual_seed(1)
    first = evaluation(items).sampled(model)
    torch.manual_seed(2)
    assert evaluation(items).sampled(model) == first != evaluation(items, seed=1).sampled(model)


@pytest.mark.parametrize("count", [1, 5])
def test_two_processes_measure_what_one_does(monkeypatch, count):
    """Each answers its own batches; the sums are added up here. With one question the second has none.

    A random model is right by chance only, so the reward is one that differs from answer to answer."""
    model, sums = tiny_model(1), []
    items = held_out_items(["lists", "sums"], 3)[:count]
    monkeypatch.setattr(policy_evaluation, "sum_scalars", lambda values: sums.append(values) or values)
    monkeypatch.setitem(REWARDS, "letters", lambda item, answer: sum(map(ord, answer)) / len(truth(item)))
    for rank in (0, 1):
        evaluation(items, World(rank, 2, rank), reward="letters")(model, None)
    total = [one + other for one, other in zip(*sums, strict=True)]
    sums.clear()
    evaluation(items, reward="letters")(model, None)
    assert total == pytest.approx(sums[0], rel=1e-12) and any(value % 1 for value in total)


def test_a_bound_measures_the_first_batches(monkeypatch):
    seen = []
    items = held_out_items(["lists", "sums"], 3)
    monkeypatch.setattr(policy_evaluation, "Generator", Scripted(lambda prompt, sample: seen.append(prompt) or ""))
    measure = evaluation(items)
    assert measure.batches == 3 and evaluation(items, World(0, 2, 0)).batches == 2
    measure(None, 1)
    assert len(seen) == 2 * 9 and {item.skill for item in items[:2]} == {"lists", "sums"}


def test_the_policy_is_found_beside_a_critic():
    models = torch.nn.ModuleDict({"critic": torch.nn.Linear(1, 1), "policy": tiny_model(1)})
    items = held_out_items(["lists"], 2)
    both = evaluation(items, policy_of=lambda model: model["policy"])
    models.train()
    assert both(models, None) == evaluation(items)(tiny_model(1), None)
    assert models.training  # and its mode is as before


def test_answers_before_and_after_stand_side_by_side(tmp_path):
    items = held_out_items(["sums"], 2)
    right, wrong = truth(items[0]), "0,0=0:\n1"
    evaluation(items).write_side_by_side(tmp_path / "deep" / "samples.txt", [wrong, wrong], [right, wrong])
    blocks = (tmp_path / "deep" / "samples.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(blocks) == 2
    assert blocks[0].splitlines() == [
        f"question  {items[0].messages[0]['content']}", f"true      {right}",
        "before    wrong  '0,0=0:\\n1'", f"after     right  {right!r}",
    ]  # fmt: skip


def test_questions_are_held_out_of_training_and_of_the_final_scores():
    items = held_out_items(["sums", "identity"], 40)
    kinds = [item.skill for item in items]
    assert kinds.count("sums") == 40 and kinds[:4] == ["sums", "identity"] * 2
    final = {item.messages[0]["content"] for name in ("sums", "identity") for item in scored_items(name, 400, 0)}
    assert not final & {item.messages[0]["content"] for item in items}
    assert all(verify(item, item.expected) for item in items) and not math.isnan(len(items))
