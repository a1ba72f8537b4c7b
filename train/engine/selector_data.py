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
from load_data.chat.chat_loader import DialogueRows
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


def selector_samples(base: Loaded, turns: list[list[Message]], table: torch.Tensor) -> list[Sample]:
    """Return questions labelled with the number of the best candidate, in place of the next token."""
    questions = [base.template.prompt(turn[-2:-1]) for turn in turns]  # up to where the answer begins
    best = table.argmin(dim=1).tolist()
    return [sample(question, [number]) for question, number in zip(questions, best, strict=True)]


def sample(prompt: list[int], targets: list[int]) -> Sample:
    """Return a sample whose loss is that of `targets`, given `prompt`."""
    ids = np.array([*prompt, *targets], dtype=np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt))


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
    samples = [answer_sample(candidate, turn) for turn in turns]
    rows = DialogueRows(samples, max(len(one.ids) for one in samples), packing=False, pad_id=0)
    order = np.argsort(rows.lengths, kind="stable").tolist()  # little padding
    losses = torch.zeros(len(order), dtype=torch.float64)
    bar = {"desc": "losses", "leave": False, "disable": None if machine.world.is_first else True}
    for first in tqdm(range(0, len(order), ROWS), **bar):
        chosen = order[first : first + ROWS]
        batch = rows.batch([[number] for number in chosen])
        ids, labels = (batch[key].to(machine.device) for key in ("input_ids", "labels"))
        with machine.autocast():  # padding follows the text, and no token attends to it
            nll = candidate.model(ids, labels=labels).nll.cpu()
        counts = (batch["labels"] != IGNORED).sum(dim=1).tolist()
        losses[chosen] = torch.stack([part.double().mean() for part in nll.split(counts)])
    return losses


def answer_sample(candidate: Loaded, turn: list[Message]) -> Sample:
    """Return the tokens of a turn; targets are those of its last answer.

    A turn that does not fit into the context of the candidate is shortened as in a conversation: the template
    or the prefix of the candidate may need more room than those of the base.
    """
    answer, learned = candidate.template.turn(turn[-1])
    marker = len(candidate.template.before["assistant"])
    answer = answer[marker : len(learned) - learned[::-1].index(True)]  # up to its end marker
    room = candidate.model.config.max_position_embeddings - candidate.model.prefix_length
    return sample(prompt_within(candidate.template, turn[:-1], room + 1 - len(answer)), answer)
