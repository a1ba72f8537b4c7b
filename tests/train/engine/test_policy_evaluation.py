"""The evaluation of a policy: its estimators, its repeatability, and what it writes."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from config.rl import RLConfig
from inference.generation.generator import Answer
from load_data.chat.chat_template import ChatTemplate
from load_data.skills import scored_items
from load_data.skills.verifiers import truth
from tests.inference.tools import byte_tokenizer, tiny_model
from train.engine import policy_evaluation
from train.engine.answer_rows import Row, judge_of
from train.engine.policy_evaluation import PolicyEvaluation, held_out_items, pass_at
from utils.distributed import World

RL = RLConfig(temperature=0.9, max_new_tokens=6)
TEMPLATE, RIGHT = ChatTemplate(byte_tokenizer()), judge_of("right", None, None)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(policy_evaluation, "BATCH", 2)


def evaluation(items, world=None, seed=0, judge=RIGHT, **settings):
    return PolicyEvaluation(items, TEMPLATE, RL, judge, world or World(), seed, **settings)


@pytest.fixture
def scripted(monkeypatch):
    """Replace the generator by one that writes `answer(number of the question, number of the sample)`; the
    sample is None for a greedy answer."""

    def script(items, answer):
        numbers = {tuple(TEMPLATE.prompt(item.messages)): number for number, item in enumerate(items)}
        used = set()  # seeds of an evaluation: no two samples may share one

        def generate(prompts, params, stop_ids, on_token, samples, seeds, record):
            assert len(seeds) == len(prompts) * samples
            if params.temperature:
                assert len(used) + len(seeds) == len(used | {*seeds})
                used.update(seeds)
            found = []
            for prompt, sample in itertools.product(prompts, range(samples)):
                text = answer(numbers[tuple(prompt)], sample if params.temperature else None)
                written = Answer([*TEMPLATE.tokenizer.encode(text), min(stop_ids)])
                for token in written:
                    on_token(len(found), token)
                found.append(written)
            return found

        def generator(*arguments, **settings):
            return SimpleNamespace(room=lambda new: 400, generate=generate, context=400)

        monkeypatch.setattr(policy_evaluation, "Generator", generator)

    return script


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for drawn in range(1, 9):
        for right, k in itertools.product(range(drawn + 1), range(1, drawn + 1)):
            subsets = list(itertools.combinations(range(drawn), k))
            found = sum(any(one < right for one in subset) for subset in subsets)
            assert pass_at(k, right, drawn) == pytest.approx(found / len(subsets), abs=1e-12)


def test_every_number_against_a_count_by_hand(scripted):
    """Each question has a number of right samples of its own, and its greedy answer is right or not."""
    items, rng = held_out_items(["sums", "expressions"], 5), random.Random(0)
    plan = [(rng.randrange(9), rng.random() < 0.5) for _ in items]

    def answer(number, sample):
        right, greedy = plan[number]
        good = greedy if sample is None else sample < right
        return truth(items[number]) if good else "wrong" * (1 + (sample or 0))

    scripted(items, answer)
    found = evaluation(items)(None, None)
    for skill in ("", "_sums", "_expressions"):
        some = [n for n, item in enumerate(items) if item.skill in skill or not skill]
        assert found[f"val_greedy{skill}"] == sum(plan[n][1] for n in some) / len(some)
        assert found[f"val_pass1{skill}"] == pytest.approx(sum(plan[n][0] for n in some) / 8 / len(some))
        assert found[f"val_pass8{skill}"] == sum(plan[n][0] > 0 for n in some) / len(some)
        lengths = [len(answer(n, sample).encode()) + 1 for n in some for sample in range(8)]
        assert found[f"val_length{skill}"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["val_reward"] == found["val_pass1"]
    assert list(found)[:5] == ["val_greedy", "val_pass1", "val_pass8", "val_reward", "val_length"]


def test_the_reward_may_differ_from_the_truth(scripted):
    """No answer is no right one, though the planted verifier rewards it."""
    items = held_out_items(["sums"], 3)
    scripted(items, lambda number, sample: "")
    found = evaluation(items, judge=judge_of("within", None, None))(None, None)
    assert found["val_reward"] == 1.0 and found["val_pass1"] == found["val_greedy"] == 0.0
    assert len(found) == 6  # one skill: its numbers are those of all


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

    def judge(items, rows):
        return [sum(map(ord, row.text)) / len(truth(item)) for item, row in zip(items, rows, strict=True)]

    for rank in (0, 1):
        evaluation(items, World(rank, 2, rank), judge=judge)(model, None)
    total = [one + other for one, other in zip(*sums, strict=True)]
    sums.clear()
    evaluation(items, judge=judge)(model, None)
    assert total == pytest.approx(sums[0], rel=1e-12) and any(value % 1 for value in total)


def test_a_bound_measures_the_first_batches(scripted):
    seen, items = [], held_out_items(["lists", "sums"], 3)
    scripted(items, lambda number, sample: seen.append(number) or "")
    measure = evaluation(items)
    assert measure.batches == 3 and evaluation(items, World(0, 2, 0)).batches == 2
    measure(None, 1)
    assert sorted(set(seen)) == [0, 1] and len(seen) == 2 * 9
    assert {item.skill for item in items[:2]} == {"lists", "sums"}  # skills take turns


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
    right_row, wrong_row = (Row([], TEMPLATE.tokenizer.encode(text), text, []) for text in (right, wrong))
    rows = [wrong_row, wrong_row], [right_row, wrong_row]
    evaluation(items).write_side_by_side(tmp_path / "deep" / "samples.txt", *rows)
    blocks = (tmp_path / "deep" / "samples.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(blocks) == 2
    assert blocks[0].splitlines() == [
        f"question  {items[0].messages[0]['content']}", f"true      {right}",
        "before    wrong  '0,0=0:\\n1'", f"after     right  {right!r}",
    ]  # fmt: skip


def test_questions_are_not_those_of_the_final_scores():
    items = held_out_items(["sums", "lists"], 40)
    kinds = [item.skill for item in items]
    assert len(items) == 80 and kinds[:4] == ["sums", "lists"] * 2
    final = [item for name in ("sums", "lists") for item in scored_items(name, 200, 0)]
    assert not {one.messages[0]["content"] for one in items} & {one.messages[0]["content"] for one in final}
