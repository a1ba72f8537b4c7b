"""Training data of the gate: turns of dialogues, the loss of each candidate on the answer, and the best one.

dialogue of n turns -> n turns, each with all messages before it
table[turn, candidate] = mean cross-entropy of the answer given all messages before it
sample: the ids of the question alone; its one label, at the last token, is the best candidate

Trap: an adapter has seen the dialogues that it was trained on, so its loss on them is too low. Judge a gate
on dialogues that neither it nor its candidates were trained on: the held-out ones.
"""

import numpy as np
import torch
from tqdm import tqdm

from inference.generation.conversation import Message, prompt_within
from inference.generation.load import Loaded
from load_data.chat.chat_data import Sample
from load_data.loader import IGNORED
from utils.errors import UserError

ROWS = 16  # turns in one forward


def turns_of(dialogues: list[list[Message]], base: Loaded, length: int) -> list[list[Message]]:
    """Return every turn that fits into `length` tokens: the messages up to and including one answer.

    Raises `UserError` if none fits.
    """
    turns = []
    for messages in dialogues:
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and place and messages[place - 1]["role"] == "user":
                turn = messages[: place + 1]
                if len(base.template.dialogue(turn)[0]) > length:
                    break  # later turns are longer
                turns.append(turn)
    if not turns:
        raise UserError(f"no turn of these dialogues fits into data.sequence_length={length}: raise it")
    return turns


def question_ids(base: Loaded, turn: list[Message]) -> list[int]:
    """Return the ids of the question of a turn, up to where the answer begins."""
    return base.template.prompt(turn[-2:-1])


def selector_samples(base: Loaded, turns: list[list[Message]], table: torch.Tensor) -> list[Sample]:
    """Return questions labelled with the number of the best candidate, in place of the next token."""
    samples = []
    for turn, best in zip(turns, table.argmin(dim=1).tolist(), strict=True):
        ids = [*question_ids(base, turn), best]
        samples.append(Sample(np.array(ids, dtype=np.int32), np.arange(len(ids)) == len(ids) - 1))
    return samples


def answer_losses(candidates: list[Loaded], turns: list[list[Message]], machine) -> torch.Tensor:
    """Return (turns, A) fp64: the loss of each candidate on the last answer of each turn, nats per token."""
    columns = []
    for candidate in candidates:
        machine.say(f"losses of {candidate.path} on {len(turns):,} turns")
        columns.append(losses_of(candidate, turns, machine))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def losses_of(candidate: Loaded, turns: list[list[Message]], machine) -> torch.Tensor:
    """Return (turns,): the loss of one candidate, nats per token."""
    rows = [labelled(candidate, turn) for turn in turns]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))  # little padding
    losses = torch.zeros(len(rows), dtype=torch.float64)
    bar = {"desc": "losses", "leave": False, "disable": None if machine.world.is_first else True}
    for first in tqdm(range(0, len(order), ROWS), **bar):
        chosen = order[first : first + ROWS]
        width = max(len(rows[number][0]) for number in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full((len(chosen), width), IGNORED)
        for row, number in enumerate(chosen):
            some, targets = rows[number]
            ids[row, : len(some)], labels[row, : len(some)] = torch.tensor(some), torch.tensor(targets)
        with machine.autocast():  # padding follows the text, and no token attends to it
            output = candidate.model(ids.to(machine.device), labels=labels.to(machine.device))
        counts = (labels != IGNORED).sum(dim=1).tolist()
        means = [part.double().mean() for part in output.nll.cpu().split(counts)]
        losses[chosen] = torch.stack(means)
    return losses


def labelled(candidate: Loaded, turn: list[Message]) -> tuple[list[int], list[int]]:
    """Return the ids of a turn and their labels: the next token, in the last answer only.

    A turn that does not fit into the context of the candidate is shortened as in a conversation: the template
    or the prefix of the candidate may need more room than those of the base.
    """
    answer, learned = candidate.template.turn(turn[-1])
    marker = len(candidate.template.before["assistant"])
    answer = answer[marker : len(learned) - learned[::-1].index(True)]  # its end included, no line break
    room = candidate.model.config.max_position_embeddings - candidate.model.prefix_length
    prompt = prompt_within(candidate.template, turn[:-1], room + 1 - len(answer))
    labels = [IGNORED] * (len(prompt) - 1) + answer
    return [*prompt, *answer[:-1]], labels
