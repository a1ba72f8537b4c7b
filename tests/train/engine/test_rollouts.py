"""Rollouts against the obvious: each answer alone, without a cache, and each group by a loop."""

import copy
import os
import statistics

import pytest
import torch

from inference.generation.exchange import Exchange
from inference.generation.generator import Generator
from load_data.skills import training_items
from tests.processes import both_ways
from tests.train.policies import (
    MOE,
    TEMPLATE,
    TOKENIZER,
    judge,
    losses,
    make_policy,
    make_run,
    rl_config,
    rollouts,
)
from tests.train.tools import largest_difference, same_bits, weights_of, without_timing
from train.engine.answer_rows import Row, row_of, set_advantages
from train.engine.rollouts import TRIES
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.log import read_log

END = TEMPLATE.end_of_turn[0]


def groups_of(rows, size=4):
    return [rows[n : n + size] for n in range(0, len(rows), size)]


def as_batch_rows(step):
    """(prompt, answer, {name: its numbers at labels}) of each row of a step, read from the tensors alone."""
    for batch in step.micro_batches:
        for b, labels in enumerate(batch["labels"]):
            kept, real = labels != -100, batch["padding_mask"][b]
            ids, first = batch["input_ids"][b], int(kept.nonzero()[0]) if kept.any() else 0
            wide = {name: value for name, value in batch.items() if value.is_floating_point()}
            numbers = {name: value[b][kept].tolist() for name, value in wide.items()}
            yield ids[: first + 1].tolist(), labels[kept].tolist(), ids[real].tolist(), numbers


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_rows_are_what_the_policy_sampled(moe, temperature):
    """Log-probabilities by a forward over the whole row, labels from the prompt's last place to the end token
    and not beyond, and the reward of the row's own question and answer."""
    config = rl_config(f"rl.temperature={temperature}", "rl.recipe=dr_grpo", *MOE * moe)
    policy = make_policy(config, dtype=torch.float64)
    source = rollouts(config, policy)
    step = source.next_step({"model": policy})
    rows = source.rows
    assert len(rows) == 12 and 0 < sum(row.truncated for row in rows) < 12
    found = {(*prompt, *answer): (ids, numbers) for prompt, answer, ids, numbers in as_batch_rows(step)}
    items = training_items(["arithmetic"], config.train.seed, config.data.val_fraction)
    for group, item in zip(groups_of(rows), items):
        prompt = TEMPLATE.prompt(item.messages)
        assert all(row.prompt == prompt for row in group)
        for row in group:
            ids = torch.tensor([prompt + row.answer])
            scores = (policy.eval()(ids).logits[0] / temperature).log_softmax(-1)
            alone = [scores[len(prompt) + n - 1, token].item() for n, token in enumerate(row.answer)]
            assert row.old == pytest.approx(alone, abs=1e-10)
            ended = row.answer[-1] in TEMPLATE.stop_ids
            assert row.truncated != ended and not set(row.answer[:-1]) & TEMPLATE.stop_ids
            assert len(row.answer) == 5 if row.truncated else True
            marked = set(row.answer) & set(TOKENIZER.special_ids.values()) - TEMPLATE.stop_ids
            assert marked or row.text == TOKENIZER.decode(row.answer)
            assert row.reward == judge([item], [row])[0]
            if not any(row.advantages):
                continue
            read, numbers = found[(*prompt, *row.answer)]
            assert read == prompt + row.answer[:-1]
            assert numbers["old_logprobs"] == row.old and numbers["advantages"] == row.advantages
    totals, _ = losses(config, policy.train(), step)
    assert totals["measured ratio"].item() == pytest.approx(1, abs=1e-10)


def test_answers_do_not_depend_on_the_batch(monkeypatch):
    """Other prompts in the batch, another number of samples: prompt n and sample g decide. No two answers
    share their random numbers."""
    seeds, generate = [], Generator.generate

    def noted(self, *given, **options):
        seeds.append(options["seeds"])
        return generate(self, *given, **options)

    monkeypatch.setattr(Generator, "generate", noted)
    config = rl_config("rl.recipe=dr_grpo")
    wide = rl_config("rl.recipe=dr_grpo", "rl.prompts=5", "rl.group_size=6")
    policy = make_policy(config, dtype=torch.float64)
    few, many = (rollouts(one, policy) for one in (config, wide))
    for source in (few, many):
        source.next_step({"model": policy})
    for small, large in zip(groups_of(few.rows), groups_of(many.rows, 6)):
        assert [row.answer for row in small] == [row.answer for row in large[:4]]
    assert len({tuple(row.answer) for row in few.rows}) > 6
    first = [row.answer for row in few.rows]
    few.next_step({"model": policy})
    assert few.position == 6 and [row.answer for row in few.rows] != first
    few, _, more = seeds
    assert len({*few, *more}) == 24


def made(rewards, size=4, **more):
    """Groups of rows with these rewards, of lengths 1, 2, 3, .."""
    rows = []
    for n, reward in enumerate(rewards):
        length = 1 + n % 3
        row = Row([1], [5] * length, "", [-0.5] * length, reward=float(reward))
        vars(row).update({name: value[:length] for name, value in more.items()})
        rows.append(row)
    return groups_of(rows, size)


@pytest.mark.parametrize("kind", ["reward", "mean", "mean_std", "leave_one_out"])
def test_a_group_is_compared_with_itself(kind):
    config, groups = rl_config(f"rl.advantage={kind}"), made([1, 0, 0, 1, 5, 7, 9, 9])
    set_advantages(groups, config.rl, config.rl.chosen())
    for group in groups:
        rewards = [row.reward for row in group]
        for n, row in enumerate(group):
            others = rewards[:n] + rewards[n + 1 :]
            mean = statistics.mean(rewards)
            expected = {
                "reward": row.reward, "mean": row.reward - mean,
                "mean_std": (row.reward - mean) / (statistics.stdev(rewards) + 1e-4),
                "leave_one_out": row.reward - statistics.mean(others),
            }[kind]  # fmt: skip
            assert row.advantages == pytest.approx([expected] * len(row.answer))


def test_a_distance_in_the_reward():
    """k1 of each token: old - reference = 0.25 here, so a longer answer pays more."""
    config = rl_config("rl.recipe=rloo", "rl.advantage=mean")
    (group,) = made([0, 0, 0], size=3, reference=[-0.75] * 3)
    set_advantages([group], config.rl, config.rl.chosen())
    assert [row.advantages[0] for row in group] == pytest.approx([0.05 * 0.25 * n for n in (1, 0, -1)])


def test_advantages_of_a_critic():
    """GAE of each row by its definition, with the distance at each token and the reward at the last; the
    advantages are then whitened over all tokens."""
    config = rl_config("rl.recipe=ppo", "rl.gamma=0.9", "rl.lam=0.8")
    rows = made([1, 0, 2, 0], reference=[-0.75, 0.0, -1.0], values=[0.3, -0.2, 0.7])
    set_advantages(rows, config.rl, config.rl.chosen())
    raw = []
    for row in rows[0]:
        n = len(row.answer)
        given = [-0.05 * (-0.5 - row.reference[t]) + row.reward * (t == n - 1) for t in range(n)]
        values = [*row.values, 0.0]
        delta = [given[t] + 0.9 * values[t + 1] - values[t] for t in range(n)]
        each = [sum(0.72 ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        assert row.returns == pytest.approx([a + v for a, v in zip(each, row.values)])
        raw += each
    mean, deviation = statistics.mean(raw), statistics.stdev(raw)
    whitened = [one for row in rows[0] for one in row.advantages]
    assert whitened == pytest.approx([(one - mean) / deviation for one in raw], rel=1e-6)


def test_dynamic_sampling_drops_groups_without_signal():
    """Every second prompt has equal rewards: three groups with signal need six prompts."""
    config = rl_config("rl.recipe=dapo", "rl.overlong=0")
    policy, asked = make_policy(config), []

    def every_second(items, rows):
        questions = [item.messages[-1]["content"] for item in items]
        asked.extend(dict.fromkeys(questions))
        return [len(row.text) + 0.1 * n if asked.index(question) % 2 else 1.0
                for n, (question, row) in enumerate(zip(questions, rows, strict=True))]  # fmt: skip

    source = rollouts(config, policy, every_second)
    assert source.next_step({"model": policy}).weight == sum(len(row.answer) for row in source.rows)
    kept = [TOKENIZER.decode(group[0].prompt) for group in groups_of(source.rows)]
    assert source.position == len(asked) == 6 and len(kept) == 3
    assert all(asked[2 * n + 1] in prompt for n, prompt in enumerate(kept))
    assert source.numbers["no_signal"] == 0.5
    source = rollouts(config, policy, lambda items, rows: [1.0] * len(items))
    assert source.next_step({"model": policy}).weight == 0 and source.position == 3 * TRIES


def test_nothing_to_learn_is_skipped():
    """Equal rewards: no step, except where the distance to the reference is part of the reward."""
    equal = lambda items, rows: [1.0] * len(items)  # noqa: E731
    for recipe, taken in (("dr_grpo", False), ("grpo", False), ("rloo", True)):
        config = rl_config(f"rl.recipe={recipe}")
        policy = make_policy(config)
        models = {"model": policy, "reference": make_policy(config, seed=1)}
        step = rollouts(config, policy, equal).next_step(models)
        assert bool(step.weight) == taken


def test_rows_without_advantage_change_nothing_but_the_weight():
    """One group of three has signal: its rows alone are trained on, and count with the others."""
    config = rl_config("rl.recipe=dr_grpo")
    policy = make_policy(config)

    def one_of_three(items, rows):
        return [float(n) if item == items[0] else 1.0 for n, item in enumerate(items)]

    source = rollouts(config, policy, one_of_three)
    step = source.next_step({"model": policy})
    assert step.weight == 12 * 5 and sum(len(batch["labels"]) for batch in step.micro_batches) == 4


def test_overlong_answers_lose_reward():
    """With a limit of 5 and overlong=0.4, lengths of 3, 4 and 5 lose 0, 1/2 and 1 (arXiv 2503.14476)."""
    config = rl_config("rl.overlong=0.4")
    source = rollouts(config, make_policy(config))
    assert [source.overlong(length) for length in (1, 3, 4, 5)] == [0, 0, 0.5, 1]


def test_bf16_scores_its_samples_again():
    """Old log-probabilities are those of the training pass: the ratio stays 1 where that rounds."""
    config = rl_config()
    policy = make_policy(config)
    source = rollouts(config, policy, dtype=torch.bfloat16)
    step = source.next_step({"model": policy, "reference": policy})
    assert 1e-5 < source.numbers["gap"] < 0.1 and "experts" not in step.micro_batches[0]
    with source.machine.autocast():
        totals, _ = losses(config, policy, step)
    assert totals["measured ratio"].item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("setting, word", [
    ("data.sequence_length=5", "sequence_length"), ("rl.reward=kind", "rules: right, within"),
    ("rl.max_new_tokens=1", "rl.think=true needs rl.max_new_tokens=2 or more"),
    ("rl.think_budget=3 rl.think=false", "rl.think_budget=3 bounds thinking"),
])  # fmt: skip
def test_what_is_refused(setting, word):
    with pytest.raises(UserError, match=word):
        config = rl_config("rl.think=true", *setting.split())
        rollouts(config, make_policy(config), None)


# --- stopped and resumed; two processes ---------------------------------------------------------------------


class Stop(Exception):
    """Stands in for a crash."""


def test_a_run_resumes_between_the_updates_of_a_rollout(tmp_path):
    """Three updates per rollout, a crash in step 6, a checkpoint after step 5: the fifth of six updates."""
    config = rl_config("rl.updates=3", "train.save_every=5", "rl.recipe=grpo", *MOE, steps=7)
    one, reference = make_policy(config), make_policy(config, seed=1)
    whole = make_run(tmp_path / "a", config, one, copy.deepcopy(reference))
    whole.run()
    two = make_policy(config)
    crashed = make_run(tmp_path / "b", config, two, copy.deepcopy(reference))
    note, taken = crashed.stage.loss.after_step, []

    def after_step(factor):
        taken.append(factor)
        if len(taken) == 6:
            raise Stop
        return note(factor)

    crashed.stage.loss.after_step = after_step
    with pytest.raises(Stop):
        crashed.run()
    three = make_policy(config, seed=3)
    rest = make_run(tmp_path / "b", config, three, copy.deepcopy(reference), resume=True)
    rest.run()
    assert rest.step == 7 and rest.stage.source.position == whole.stage.source.position == 9
    assert same_bits(weights_of(one), weights_of(three))
    logs = [without_timing(read_log(tmp_path / name / "toy" / "log.txt")) for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) > 7
    saved = load_checkpoint(tmp_path / "a" / "TinySeek_Toy_final.pkl")
    assert same_bits(saved["weights"], weights_of(one))


# eps: Adam divides the rounding of a gradient by its size, and would make an unused weight move by lr
SETTINGS = ("rl.updates=2", "rl.prompts=3", "balance.statistics=exact", "optim.eps=0.001", *MOE)


def train_in(out):
    """One of several processes, or the only one; the first keeps what it saw."""
    config = rl_config(*SETTINGS)
    world = distributed.start() if "RANK" in os.environ else World()
    policy = make_policy(config)
    run = make_run(out, config, policy, make_policy(config, seed=1), world=world)
    run.run()
    if world.is_first:
        rows = [(row.prompt, row.answer, row.reward) for row in run.stage.source.rows]
        torch.save({"weights": policy.state_dict(), "rows": rows}, out / "seen.pt")


def test_two_processes_equal_one(tmp_path):
    """3 prompts: one process samples two of them in each rollout and the other one; four steps."""
    one, two = both_ways(train_in, tmp_path)
    assert one["rows"] == two["rows"] and len(one["rows"]) == 12
    assert largest_difference(one["weights"], two["weights"]) < 1e-5


# --- thinking and tools -----------------------------------------------------------------------------------


def test_what_the_policy_did_not_choose_is_read_and_never_scored(monkeypatch):
    """Every other row calls a tool, once or twice: results and forced ends of thoughts are read by the model,
    and only the policy's own tokens have numbers and labels."""
    config = rl_config(
        "rl.recipe=dr_grpo", "rl.tools=true", "rl.think=true", "rl.think_budget=2", "rl.prompts=4",
        "rl.aggregation=token",
        "rl.max_new_tokens=8", "model.max_position_embeddings=400", "data.sequence_length=100", *MOE,
    )  # fmt: skip
    policy, special = make_policy(config, dtype=torch.float64), TOKENIZER.special_ids
    written = [special["<tool_call>"], 70, special["</tool_call>"], END]
    generate = Generator.generate

    def calling(self, prompts, params, stop_ids, on_token, must, **options):
        prompts_of = [prompt for prompt in prompts for _ in range(options["samples"])]

        def also(row, new):
            thought = 2 if special["<tool_response>"] not in prompts_of[row] else 1  # the budget is used up
            place, calls = len(new) - thought - 1, prompts_of[row].count(special["<tool_response>"])
            wants = row % 2 == 0 and calls < 2 and 0 <= place < 4
            return written[place] if wants else must(row, new)

        return generate(self, prompts, params, stop_ids, on_token, must=also, **options)

    monkeypatch.setattr(Generator, "generate", calling)
    source = rollouts(config, policy)
    step = source.next_step({"model": policy})
    rows, forced = source.rows, 0
    assert source.numbers["calls"] == sum(row.calls for row in rows) / 16 > 0
    for row in rows:
        ids, own = row.prompt + row.answer, row.own or [True] * len(row.answer)
        assert row.prompt[-1] == special["<think>"]
        assert own[-1] and len(row.old) == row.length == sum(own) and row.experts
        scores = (policy.eval()(torch.tensor([ids])).logits[0]).log_softmax(-1)
        alone = [scores[len(row.prompt) + n - 1, token].item() for n, token in enumerate(row.answer)]
        assert row.old == pytest.approx([one for one, mine in zip(alone, own) if mine], abs=1e-10)
        others, inside = [], False  # from the <|im_end|> of a call to the <think> of the next answer
        for token, mine in zip(row.answer, own):
            if not mine and token == special["</think>"] and not inside:
                forced += 1
            else:
                others.append(inside == mine)
            inside = token == END or inside and token != special["<think>"]
        assert not any(others)
        assert row.answer.count(special["<tool_response>"]) <= row.calls
    assert step.weight == sum(row.length for row in rows) and max(row.length for row in rows) > 8
    assert forced and {row.calls for row in rows} >= {0, 1, 2}
    labels = {tuple(answer): read for _, answer, read, _ in as_batch_rows(step)}
    for row in rows:
        if any(row.advantages):
            assert labels[tuple(row.chosen)] == (row.prompt + row.answer)[:-1]
    totals, _ = losses(config, policy.train(), step)
    assert totals["measured ratio"].item() == pytest.approx(1, abs=1e-10)


def test_a_row_ends_with_what_the_policy_chose():
    """The context had room for the result of a tool, and for nothing after it: the call gets no answer."""
    tool, call = {"role": "tool", "content": "85"}, {"role": "assistant", "content": "", "tool_calls": ["1"]}
    own, logprobs = [True, True, False, False], [-1.0, -2.0, 0.0, 0.0]
    one = Exchange(0, [1, 2], [5, 6, 7, 8], own, logprobs, [3, 3, 3], [call, tool], finish_reason="length")
    row = row_of(one)
    assert (row.answer, row.own, row.old, row.length) == ([5, 6], [], [-1.0, -2.0], 2)
    assert row.text == "" and row.calls == 1 and row.truncated and len(row.experts) == 3


@pytest.mark.parametrize("moe", [False, True])
def test_a_thought_that_fills_the_answer(moe):
    """The forced </think> is the last token that there is room for; the row ends before it, and so do its
    experts."""
    config = rl_config("rl.advantage=reward", "rl.kl=none", "rl.think=true", "rl.think_budget=4", *MOE * moe)
    policy = make_policy(config, dtype=torch.float64)
    source = rollouts(config, policy)
    step = source.next_step({"model": policy})
    assert 4 in [len(row.answer) for row in source.rows]
    for row in source.rows:
        assert len(row.experts) == (len(row.prompt) + len(row.answer) - 1) * moe
    totals, _ = losses(config, policy.train(), step)
    assert totals["measured ratio"].item() == pytest.approx(1, abs=1e-10)


def test_the_penalty_of_long_answers_is_at_most_1():
    """Several answers around calls may together be longer than one may be."""
    config = rl_config("rl.overlong=0.4", "rl.max_new_tokens=10")
    source = rollouts(config, make_policy(config))
    assert [source.overlong(length) for length in (6, 8, 10, 30)] == [0.0, 0.5, 1.0, 1.0]


def test_results_of_tools_leave_no_trace_in_advantages():
    """The next token of the policy follows directly: the same numbers with a result between, and without."""
    config = rl_config("rl.recipe=ppo", "rl.kl_weight=0.5")

    def row(answer, own):
        return Row([1], answer, "", [-1.0, -0.5, -2.0], own, reward=3.0, values=[0.3, 0.1, 0.9],
                   reference=[-1.5, -0.2, -2.0])  # fmt: skip

    plain, called = row([5, 6, 7], []), row([5, 6, 9, 9, 9, 7], [True, True, False, False, False, True])
    for one in (plain, called):
        set_advantages([[one]], config.rl, config.rl.chosen())
    assert called.advantages == plain.advantages and called.returns == plain.returns
    assert called.chosen == plain.answer and len(called.advantages) == called.length == 3
