"""The rows of a rollout: sampled answers with their rewards, and how they become advantages and tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

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
    """One answer. Lists have a number for each of its tokens; empty ones are not used by the recipe."""

    prompt: list[int]
    answer: list[int]
    text: str
    old: list[float]  # log-probabilities under the policy that sampled it
    experts: list[int] = field(default_factory=list)  # routing codes of prompt and answer but its last token
    reward: float = 0.0
    right: bool = False
    truncated: bool = False
    gap: float = 0.0  # sum of |difference| where the row was scored again
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # of the critic
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


Judge = Callable[[list[Item], list[Row]], list[float]]  # questions, answers -> the reward of each answer


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
        answer = slice(len(row.prompt) - 1, end)
        batch["input_ids"][b, :end] = torch.tensor(ids[:-1])
        batch["labels"][b, answer] = torch.tensor(row.answer)
        batch["padding_mask"][b, :end] = True
        for key in used:
            batch[AT_LABELS[key]][b, answer] = torch.tensor(getattr(row, key), dtype=wide)
        if first and row.experts:
            batch["experts"][b, :end] = torch.tensor(row.experts)
    return batch


def set_advantages(groups: list[list[Row]], rl, recipe) -> None:
    """Set the advantages of all rows, and with a critic their returns."""
    rows = [row for group in groups for row in group]
    if not rows:
        return
    lengths = torch.tensor([len(row.answer) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, T)

    def padded(name):
        wide = torch.zeros(mask.shape, dtype=torch.float64)
        wide[mask] = torch.tensor([value for row in rows for value in getattr(row, name)], dtype=wide.dtype)
        return wide

    rewards = torch.zeros(mask.shape, dtype=torch.float64)  # of each token: that of the answer at its end
    rewards[torch.arange(len(rows)), lengths - 1] = torch.tensor([row.reward for row in rows]).double()
    if recipe.kl_weight and recipe.kl_place == "reward":
        distance = kl_estimate(padded("old"), padded("reference"), recipe.kl)
        rewards -= recipe.kl_weight * distance.where(mask, 0)
    if recipe.advantage == "gae":
        advantages, returns = gae(rewards, padded("values"), mask, rl.gamma, rl.lam)
        advantages = whiten(advantages, mask)
        for row, each in zip(rows, returns.tolist(), strict=True):
            row.returns = each[: len(row.answer)]
    else:
        totals = rewards.sum(dim=1).view(len(groups), -1)  # (P, G)
        advantages = group_advantages(totals, recipe.advantage).view(-1, 1).expand_as(mask)
    for row, each in zip(rows, advantages.tolist(), strict=True):
        row.advantages = each[: len(row.answer)]


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
