"""The rows of a rollout: sampled answers with their rewards, and how they become advantages and tensors.

What follows a prompt may hold ids that the policy did not choose: results of tools, and a forced </think>.
They are read, but never scored: all lists of numbers of a row are about the ids that it chose.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import torch

from inference.generation.exchange import Exchange, Request, respond
from inference.generation.reward import load_reward
from load_data.chat.chat_template import ChatTemplate
from load_data.loader import IGNORED
from load_data.skills import Item
from load_data.skills.verifiers import REWARDS
from modules.alignment.advantage import gae, group_advantages, whiten
from modules.alignment.kl import kl_estimate
from train.engine.stage import Batch
from utils.errors import UserError

# What a row has for each token of its answer, and the name of it in a micro-batch.
AT_LABELS = {"old": "old_logprobs", "advantages": "advantages", "reference": "reference_logprobs",
             "values": "old_values", "returns": "returns"}  # fmt: skip


@dataclass
class Row:
    """One answer. Lists of numbers have one for each `chosen` token; the recipe does not use empty ones."""

    prompt: list[int]
    answer: list[int]  # all ids after the prompt; the policy chose the last one
    text: str  # what is judged: the content of the last message
    old: list[float]  # log-probabilities under the policy that sampled it
    own: list[bool] = field(default_factory=list)  # whether the policy chose an id; empty if it chose all
    calls: int = 0  # of tools
    experts: list[int] = field(default_factory=list)  # routing codes of prompt and answer but its last token
    reward: float = 0.0
    right: bool = False
    truncated: bool = False
    gap: float = 0.0  # sum of |difference| where the row was scored again
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # of the critic
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)

    @property
    def chosen(self) -> list[int]:
        """The ids that the policy chose."""
        return list(compress(self.answer, self.own)) if self.own else self.answer

    @property
    def length(self) -> int:
        """The number of ids that the policy chose."""
        return sum(self.own) if self.own else len(self.answer)


Judge = Callable[[list[Item], list[Row]], list[float]]  # questions, answers -> the reward of each answer


def request_of(rl, template: ChatTemplate) -> Request:
    """Return the thinking and the tools of section `rl`. Raises `UserError` if the model knows neither."""
    request = Request(rl.think, rl.think_budget, rl.tools)
    request.check(template)
    return request


def answered(generator, template, prompts, params, request: Request, seeds, record=False) -> list[Row]:
    """Return the same number of answers to each of `prompts`, one for each of `seeds`, side by side."""
    samples = len(seeds) // len(prompts)
    found = respond(
        generator, template, prompts, params, request, samples=samples, seeds=seeds, record=record
    )
    return [row_of(one) for one in found]


def row_of(one: Exchange) -> Row:
    """Return an exchange as a row, up to the last id that the policy chose."""
    own = one.own
    while own and not own[-1]:
        own = own[:-1]  # a result of a tool or a forced </think>, with no room for what follows
    read = len(one.prompt) + len(own) - 1
    calls = sum(len(message.get("tool_calls", ())) for message in one.messages)
    old = list(compress(one.logprobs, own))
    last = one.messages[-1]
    text = last["content"] if last["role"] == "assistant" else ""
    return Row(one.prompt, one.ids[: len(own)], text, old, [] if all(own) else own, calls,
               one.experts[:read], truncated=one.finish_reason != "stop")  # fmt: skip


def collate(rows: list[Row], used: list[str], pad_id: int, wide: torch.dtype, first: bool = False) -> Batch:
    """Return rows as a micro-batch; without rows, one of padding alone.

    used: the lists of a row to include, in dtype `wide`. first: include the experts, see `PolicyLoss`.
    """
    width = max((len(row.prompt) + len(row.answer) - 1 for row in rows), default=1)
    shape = (max(len(rows), 1), width)
    batch = {"input_ids": torch.full(shape, pad_id), "labels": torch.full(shape, IGNORED),
             "padding_mask": torch.zeros(shape, dtype=torch.bool)}  # fmt: skip
    batch |= {AT_LABELS[key]: torch.zeros(shape, dtype=wide) for key in used}
    if first:
        batch["experts"] = torch.zeros(shape, dtype=torch.long)
    for b, row in enumerate(rows):
        ids = row.prompt + row.answer
        end = len(ids) - 1  # the last token is predicted, and predicts nothing
        places = torch.arange(len(row.prompt) - 1, end)  # of the labels that are the answer
        chosen = places[torch.tensor(row.own)] if row.own else places
        batch["input_ids"][b, :end] = torch.tensor(ids[:-1])
        batch["labels"][b, chosen] = torch.tensor(row.chosen)
        batch["padding_mask"][b, :end] = True
        for key in used:
            batch[AT_LABELS[key]][b, chosen] = torch.tensor(getattr(row, key), dtype=wide)
        if first and row.experts:
            batch["experts"][b, :end] = torch.tensor(row.experts)
    return batch


def mask_of(rows: list[Row]) -> torch.Tensor:
    """Return (N, T), True at the T chosen ids of each of N rows: side by side, without results of tools."""
    lengths = torch.tensor([row.length for row in rows], dtype=torch.long)
    return torch.arange(max((row.length for row in rows), default=0)) < lengths[:, None]


def set_advantages(groups: list[list[Row]], rl, recipe) -> None:
    """Set the advantages of all rows, and with a critic their returns."""
    rows = [row for group in groups for row in group]
    if not rows:
        return
    mask = mask_of(rows)  # (N, T)

    def padded(name):
        wide = torch.zeros(mask.shape, dtype=torch.float64)
        wide[mask] = torch.tensor([value for row in rows for value in getattr(row, name)], dtype=wide.dtype)
        return wide

    rewards = torch.zeros(mask.shape, dtype=torch.float64)  # of each token: that of the answer at its end
    ends = mask.sum(dim=1) - 1  # (N,)
    rewards[torch.arange(len(rows)), ends] = torch.tensor([row.reward for row in rows]).double()
    if recipe.kl_weight and recipe.kl_place == "reward":
        distance = kl_estimate(padded("old"), padded("reference"), recipe.kl)
        rewards -= recipe.kl_weight * distance.where(mask, 0)
    if recipe.advantage == "gae":
        advantages, returns = gae(rewards, padded("values"), mask, rl.gamma, rl.lam)
        advantages = whiten(advantages, mask)
        for row, each in zip(rows, returns.tolist(), strict=True):
            row.returns = each[: row.length]
    else:
        totals = rewards.sum(dim=1).view(len(groups), -1)  # (P, G)
        advantages = group_advantages(totals, recipe.advantage).view(-1, 1).expand_as(mask)
    for row, each in zip(rows, advantages.tolist(), strict=True):
        row.advantages = each[: row.length]


def explained(rows: list[Row]) -> float:
    """Return the share of the variance of the returns that the critic's values explain: 1 is all, 0 is none
    or worse."""
    returns, values = (torch.tensor([x for row in rows for x in getattr(row, name)]).double()
                       for name in ("returns", "values"))  # fmt: skip
    variance = float(returns.var(correction=0))
    return max(0.0, 1 - float((returns - values).var(correction=0)) / variance) if variance else 0.0


def has_signal(group: list[Row]) -> bool:
    """Return whether the answers to a prompt differ in their rewards."""
    return len({row.reward for row in group}) > 1


def judge_of(reward: str, template: ChatTemplate, device: torch.device) -> Judge:
    """Return the judge that `rl.reward` names: a rule of load_data/skills/verifiers.py, or the file of a
    reward model (train/reward_train.py)."""
    if rule := REWARDS.get(reward):
        return lambda items, rows: [rule(item, row.text) for item, row in zip(items, rows, strict=True)]
    if not Path(reward).is_file():
        raise UserError(f"rl.reward={reward}: no such rule, nor a file; rules: {', '.join(REWARDS)}")
    model = load_reward(reward, template, device)
    return lambda items, rows: model([row.prompt for row in rows], [row.answer for row in rows]).tolist()
