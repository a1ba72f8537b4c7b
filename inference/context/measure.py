"""Measure how far a model reads: its loss by position, and the share of items recalled from a distance.

No text is generated: an answer is right if each of its tokens is the most probable one after the tokens
before it, which is exactly when greedy decoding writes it.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch

from inference.context.tasks import Haystack
from load_data.loader import eval_windows
from model.tinyseek import TinySeek

ROW_TOKENS = 8192  # in one forward pass, at most, unless one row is longer


@torch.inference_mode()
def loss_by_position(model: TinySeek, tokens: np.ndarray, length: int, windows: int):
    """Return the mean loss in nats at each position (length,) of at most `windows` windows of `tokens`."""
    device, rows = next(model.parameters()).device, max(1, ROW_TOKENS // length)
    total, count = torch.zeros(length, dtype=torch.float64), 0
    whole = tokens[: (len(tokens) - 1) // length * length + 1]  # without a shorter last window
    for batch in eval_windows(whole, length, rows, -(-windows // rows)):
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        total += model(ids, labels=labels).nll.view(ids.shape).double().sum(dim=0).cpu()  # (B, T) -> (T,)
        count += len(ids)
    return total / count


@torch.inference_mode()
def recalled(model: TinySeek, rows: list[list[int]], answers: list[int]) -> list[bool]:
    """Return for each row, of equal lengths, whether its last `answers[row]` tokens are recalled."""
    device, longest, right = next(model.parameters()).device, max(answers), []
    for ids, counts in batches(rows, answers):
        ids = torch.tensor(ids, device=device)
        hidden = model.model(ids).hidden[:, -longest - 1 : -1]  # (B, A, C)
        hits = model.logits(hidden).argmax(dim=-1) == ids[:, -longest:]  # (B, A)
        right += [bool(hit[longest - count :].all()) for hit, count in zip(hits, counts, strict=True)]
    return right


def batches(rows: list, answers: list) -> Iterator[tuple[list, list]]:
    """Yield rows and answers in batches of at most `ROW_TOKENS` tokens."""
    size = max(1, ROW_TOKENS // len(rows[0]))
    for first in range(0, len(rows), size):
        yield rows[first : first + size], answers[first : first + size]


def recall_grid(
    model: TinySeek, haystack: Haystack, task: str, lengths: list[int], depths: list[float], count: int,
    seed: int = 0, done=lambda cells: None,
) -> np.ndarray:  # fmt: skip
    """Return the percentage of `count` items recalled, for each length and depth: (lengths, depths).

    The same seed asks every model the same items. `done(1)` is called after each cell.
    """
    grid = np.zeros((len(lengths), len(depths)))
    for i, length in enumerate(lengths):
        for j, depth in enumerate(depths):
            rng = random.Random(f"{seed} {task} {length} {depth}")
            items = [haystack.item(task, rng) for _ in range(count)]
            rows = [haystack.row(item, length, depth, rng) for item in items]
            grid[i, j] = 100 * np.mean(recalled(model, rows, [len(item.answer) for item in items]))
            done(1)
    return grid
