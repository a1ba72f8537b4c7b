"""Reward models (train/reward_train.py): load one, and score answers with it."""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from inference.generation.load import REWARD, build, open_as
from load_data.chat.chat_template import ChatTemplate
from model.scalar import ScalarModel
from utils.errors import UserError

ROWS = 64  # answers that are scored together


class RewardModel:
    """`reward(prompts, answers)` -> the reward of each answer (N,), read at its last token.

    prompts, answers: N lists of ids each, a prompt up to where the assistant begins to write, an answer with
    its end marker unless it was cut.
    """

    def __init__(self, model: ScalarModel):
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        """Score in batches of rows of similar length; a row's reward does not depend on the others."""
        rows = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        rewards, weight = torch.zeros(len(rows)), self.model.score.weight
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        for first in range(0, len(order), ROWS):
            chosen = order[first : first + ROWS]
            ids = pad_sequence([rows[number] for number in chosen], batch_first=True)  # (B, T)
            lengths = torch.tensor([len(rows[number]) for number in chosen])
            real = torch.arange(ids.shape[1]) < lengths[:, None]
            scores = self.model(ids.to(weight.device), padding_mask=real.to(weight.device)).cpu()
            rewards[chosen] = scores[torch.arange(len(chosen)), lengths - 1].to(rewards)
        return rewards


def load_reward(path: str | Path, template: ChatTemplate, device: str | torch.device = "cpu") -> RewardModel:
    """Return the reward model in `path`, for rows that `template` writes.

    Raises `UserError` if the file holds none, or one that reads other ids or another template.
    """
    about = open_as(REWARD, path)
    model, tokenizer, config = build(ScalarModel, about, path)
    if tokenizer.digest != template.tokenizer.digest:
        raise UserError(
            f"{path}: this reward model reads the ids of another tokenizer ({tokenizer.digest}, not "
            f"{template.tokenizer.digest}); train one with python train/reward_train.py --init POLICY"
        )
    if config.data.template != template.kind:
        raise UserError(
            f"{path}: this reward model was trained with data.template={config.data.template}, the policy "
            f"writes {template.kind}: use one template for both"
        )
    return RewardModel(model.to(device))
