"""Rollouts: a `Source` that samples its own data from the policy, and judges it.

    prompts -> G answers each -> rewards -> advantages -> `rl.updates` optimizer steps on all of them

Prompt n of a run is the same for any number of processes, and so is answer g to it, whose random numbers are
seeded by n and g. Process r of R samples the prompts with n mod R = r. Then all processes exchange their
rows, so that each of them knows the whole rollout, and train on a share of it.

The loss sees each token that the policy has chosen, the end token included, and nothing after it. An answer
without an end was cut at `rl.max_new_tokens`; its verifier judges it as it is.

Old log-probabilities are those recorded while sampling. In fp32 on a CPU they are exact, which the first
update asserts (train/engine/policy_loss.py). In other dtypes, and with TF32 on a GPU, sampling and scoring
round differently; there each rollout is scored once by the training pass, and `gap` is the mean difference.

A row without advantage teaches nothing unless a term of the loss pulls it to the reference, so it is left
out of the update; the weight of the step counts it. If no row has an advantage, the step is skipped.
"""

import time
from dataclasses import asdict

import torch

from inference.generation.conversation import prompt_within
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, row_seed
from load_data.loader import IGNORED
from load_data.skills import Item, training_items
from load_data.skills.verifiers import verify
from modules.alignment.policy_gradient import weight_of
from train.engine.answer_rows import (
    Judge, Row, answered, collate, explained, has_signal, judge_of, mask_of, request_of, set_advantages,
)  # fmt: skip
from train.engine.policy_loss import token_logprobs
from train.engine.stage import Batch, Step
from utils.distributed import gather
from utils.errors import UserError

LOOKED_AT = 100  # questions that must fit; a rare one that does not is cut as in fine-tuning
TRIES = 4  # rounds of dynamic sampling; a rollout may then have fewer groups


class Rollouts:
    """The training data of a policy on the skills `names`.

    Args:
        policy: for the gradient proof alone; `next_step` takes the models it is given: the policy (`model`,
            or `policy` beside a `critic`), and `reference` where the recipe needs it.
        judge: (questions, answers) -> the reward of each answer; by default what `rl.reward` names.
    """

    epoch, epoch_progress = 0, 0.0  # prompts never end

    def __init__(self, policy, template, names: list[str], config, machine, judge: Judge | None = None):
        self.policy, self.template, self.names, self.machine = policy, template, names, machine
        self.config, self.rl, self.recipe = config, config.rl, config.rl.chosen()
        self.request = request_of(self.rl, template)
        self.judge = judge or judge_of(config.rl.reward, template, machine.device)
        self.rescored = machine.device.type != "cpu" or machine.dtype != torch.float32
        self.position = 0  # the next prompt
        self.rows, self.left = [], 0  # the present rollout, and updates left on it
        self.numbers = {}  # for the log
        self.used = ["old", "advantages", *["reference"] * bool(self.recipe.kl_weight)]
        self.used += ["values", "returns"] * (self.recipe.advantage == "gae")
        room, most = config.data.sequence_length, self.rl.max_new_tokens
        items, thinking = map(self.item, range(LOOKED_AT)), self.request.thinking
        longest = max(len(template.prompt(item.messages, thinking)) for item in items)
        if longest > room - most:
            raise UserError(
                f"data.sequence_length={room} leaves no room for a question of {longest} tokens beside an "
                f"answer of rl.max_new_tokens={most}: raise the one or lower the other"
            )

    def next_step(self, models: dict, progress: float = 0.0) -> Step:
        """Return one update on the present rollout; first sample one if that is used up."""
        fresh = not self.left
        if fresh:
            self.rows, self.left = self.rollout(models), self.rl.updates
        self.left -= 1
        numbers = self.numbers if fresh else self.numbers | {"rollout_ms": 0.0}
        return self.step(self.rows, first=fresh and not self.rescored)._replace(numbers=numbers)

    def sample(self) -> Step:
        """Return a step on true answers as if they had been sampled, for the gradient proof."""
        rows, end = [], self.template.end_of_turn[0]
        for number in range(self.machine.world.size * self.config.train.batch_size):
            item = self.item(number)
            ids = [*self.template.content("assistant", item.expected)[: self.rl.max_new_tokens - 1], end]
            rows.append(Row(self.prompt(item), ids, item.expected, [0.0] * len(ids)))
        self.score(self.policy, rows, "old")
        for row in rows:  # away from distances of 0 and from clips, where a healthy model has no gradient:
            # the proof moves zeros (LoRA's B), and the critic of a resumed run may expect anything
            row.advantages, row.returns, row.values = ([each] * len(row.answer) for each in (1.0, 2.0, 2.0))
            if self.recipe.kl_weight:
                row.reference = [value - 0.5 for value in row.old]
            row.old = [value + 0.5 for value in row.old]
        return self.step(rows)

    def state_dict(self) -> dict:
        """Return the place in the prompts, and the rollout if updates on it are left."""
        rows = [asdict(row) for row in self.rows] if self.left else []
        return {"position": self.position, "left": self.left, "rows": rows, "numbers": self.numbers}

    def load_state_dict(self, state: dict) -> None:
        """Continue."""
        self.position, self.left, self.numbers = state["position"], state["left"], state["numbers"]
        self.rows = [Row(**row) for row in state["rows"]]

    # -------------------------------------------------------------------------------------------- sampling

    def rollout(self, models: dict) -> list[Row]:
        """Sample and judge; return the rows of all processes, the answers to a prompt side by side."""
        clock, rl, groups, seen, self.seconds = time.perf_counter(), self.rl, [], [], 0.0
        for _ in range(TRIES if self.recipe.dynamic_sampling else 1):
            numbers = range(self.position, self.position + rl.prompts - len(groups))
            new = self.groups(models, numbers)
            self.position, seen = numbers.stop, seen + new
            groups += [group for group in new if has_signal(group) or not self.recipe.dynamic_sampling]
            if len(groups) == rl.prompts:
                break
        set_advantages(groups, rl, self.recipe)
        rows = [row for group in seen for row in group]
        tokens, count = sum(row.length for row in rows), len(rows)
        self.numbers = {
            "reward": sum(row.reward for row in rows) / count,
            "right": sum(row.right for row in rows) / count,
            "no_signal": sum(not has_signal(group) for group in seen) / len(seen), "length": tokens / count,
            "truncated": sum(row.truncated for row in rows) / count, "rollout_tok_s": tokens / self.seconds,
            "rollout_ms": (time.perf_counter() - clock) * 1e3,
        }  # fmt: skip
        if self.rl.tools:
            self.numbers["calls"] = sum(row.calls for row in rows) / count
        if self.recipe.advantage == "gae":
            self.numbers["explained"] = explained([row for group in groups for row in group])
        if self.rescored:
            self.numbers["gap"] = sum(row.gap for row in rows) / tokens
        return [row for group in groups for row in group]

    def groups(self, models: dict, numbers: range) -> list[list[Row]]:
        """Return the groups of these prompts, in their order, sampled by all processes together."""
        world, G = self.machine.world, self.rl.group_size
        mine = [number for number in numbers if number % world.size == world.rank]
        items = [self.item(number) for number in mine for _ in range(G)]
        policy, rows = models["policy" if "policy" in models else "model"], []
        clock = time.perf_counter()
        if mine:
            params = SamplingParams(self.rl.temperature, max_new_tokens=self.rl.max_new_tokens)
            seeds = [row_seed(self.config.train.seed, number, g) for number in mine for g in range(G)]
            prompts = [self.prompt(item) for item in items[::G]]
            rows = answered(Generator(policy), self.template, prompts, params, self.request, seeds, True)
        self.seconds += time.perf_counter() - clock
        rewards = self.judge(items, rows)
        for item, row, reward in zip(items, rows, rewards, strict=True):
            row.right, row.reward = verify(item, row.text), reward - self.overlong(row.length)
        if self.rescored:
            sampled = [row.old for row in rows]
            self.score(policy, rows, "old")
            for row, old in zip(rows, sampled, strict=True):
                row.gap = sum(abs(one - other) for one, other in zip(row.old, old, strict=True))
        for name, key in (("reference", "reference"), ("critic", "values")):
            if name in models:
                self.score(models[name], rows, key)
        found = dict(zip(mine, (rows[n : n + G] for n in range(0, len(rows), G)), strict=True))
        together = {number: group for part in gather(found) for number, group in part.items()}
        return [together[number] for number in numbers]

    def item(self, number: int) -> Item:
        """Return the question of prompt `number`."""
        data = self.config.data
        return next(training_items(self.names, self.config.train.seed, data.val_fraction, start=number))

    def prompt(self, item: Item) -> list[int]:
        """Return the ids of a question."""
        room = self.config.data.sequence_length - self.rl.max_new_tokens
        return prompt_within(self.template, item.messages, room, self.request.thinking)

    def overlong(self, length: int) -> float:
        """Return the penalty of an answer: from 0 to 1 over the last share of the limit (DAPO)."""
        margin = self.recipe.overlong * self.rl.max_new_tokens
        over = length - (self.rl.max_new_tokens - margin)
        return min(max(0.0, over / margin), 1.0) if margin else 0.0

    @torch.no_grad()
    def score(self, model, rows: list[Row], key: str) -> None:
        """Set `key` of the rows: their log-probabilities under `model`, or their values by a critic."""
        order = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
        size = self.config.train.batch_size
        for start in range(0, len(order), size):
            part = order[start : start + size]
            batch = {name: value.to(self.machine.device) for name, value in self.batch(part, []).items()}
            about = {"padding_mask": batch["padding_mask"]}
            with self.machine.autocast():
                if key == "values":
                    found = model(batch["input_ids"], **about)
                else:
                    hidden = model(batch["input_ids"], **about, last_only=True).hidden
                    found, _ = token_logprobs(model, hidden, batch["labels"], self.rl.temperature)
            for row, numbers, labels in zip(part, found.tolist(), batch["labels"].tolist(), strict=True):
                chosen = [one for one, label in zip(numbers, labels, strict=True) if label != IGNORED]
                setattr(row, key, chosen)

    # ------------------------------------------------------------------------------------------ the update

    def step(self, rows: list[Row], first: bool = False) -> Step:
        """Return this process's share of `rows` as the micro-batches of one step."""
        world, size, G = self.machine.world, self.config.train.batch_size, self.rl.group_size
        weight = weight_of(mask_of(rows), self.recipe.aggregation, self.rl.max_new_tokens)
        pulled = self.recipe.kl_weight and self.recipe.kl_place == "loss"
        shares = [[] for _ in range(world.size)]
        for number, row in enumerate(rows):
            if pulled or any(row.advantages) or any(row.returns):
                shares[number // G % world.size].append(row)
        most = max(map(len, shares))
        share = sorted(shares[world.rank], key=lambda row: len(row.prompt) + len(row.answer))
        # The same number of micro-batches in all processes, which exchange statistics in each.
        parts = [share[start : start + size] for start in range(0, most, size)]
        batches = [self.batch(part, self.used, first) for part in parts]
        tokens = sum(len(row.prompt) + len(row.answer) - 1 for rows in shares for row in rows)
        taught = any(any(row.advantages) or any(row.returns) for row in rows)
        return Step(batches, weight if taught else 0.0, tokens)

    def batch(self, rows: list[Row], used: list[str], first: bool = False) -> Batch:
        """Return rows as a micro-batch."""
        wide = torch.promote_types(self.policy.lm_head.weight.dtype, torch.float32)
        return collate(rows, used, self.template.tokenizer.pad_id, wide, first)
