"""On-policy distillation (GKD, arXiv 2306.13649): the student learns on what it writes itself.

    step on data        question  the data's answer          both: the divergence of student and teacher
    step on samples     question  the student's answer       at each token of the answer

A student that learns only from good answers never sees the mistakes that it makes when it writes alone. With
probability `distill.on_policy`, a step replaces the answers of its dialogues by samples of the current
student. No gradient flows through the sampling. Samples are not the truth: they have labels, which say where
the divergence is measured, and the entry `own`, so that the loss leaves out their cross-entropy.

    micro-batch: input_ids (B, T), labels (B, T) on sampled tokens alone, padding_mask (B, T), own ()

In a dialogue of several turns the last answer is sampled, after the true ones before it. Each answer has a
row of its own. A packed row gives as many questions as it has room for answers of `distill.max_new_tokens`:
without this bound, a student that does not stop would make a step many times as long. The other questions
wait for the next epoch. Which steps are sampled, and each answer's random numbers, depend on the seed, the
step and the place of the dialogue in the step: a resumed run repeats them, with any number of processes.
"""

import random
import time
from itertools import groupby

import torch

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, row_seed
from load_data.chat.chat_template import ChatTemplate
from load_data.loader import IGNORED
from train.engine.answer_rows import Row, collate
from train.engine.stage import Batch, LoaderSource, Step
from utils import distributed


class StudentSamples:
    """A `Source` of dialogues, some of whose steps have answers of `student`."""

    epoch = property(lambda self: self.given.epoch)
    epoch_progress = property(lambda self: self.given.epoch_progress)

    def __init__(self, given: LoaderSource, student, template: ChatTemplate, config, machine):
        self.given, self.student, self.template, self.world = given, student, template, machine.world
        settings, self.seed, self.steps = config.distill, config.train.seed, 0
        self.room = config.data.sequence_length
        warm = 1.0 if settings.answer_temperature is None else settings.answer_temperature
        self.params = SamplingParams(warm, max_new_tokens=settings.max_new_tokens)
        self.share, self.sample = settings.on_policy, given.sample

    def next_step(self, models=None, progress: float = 0.0) -> Step:
        """Return the next step of the data, perhaps with the student's answers."""
        step, number, clock = self.given.next_step(models, progress), self.steps, time.perf_counter()
        self.steps += 1
        # not from the generators of the process, which differ between processes
        if random.Random(f"on policy {self.seed} {number}").random() >= self.share or not step.weight:
            return step._replace(numbers={"own": 0.0, "rollout_ms": 0.0})
        batches = [self.sampled(batch, number, micro) for micro, batch in enumerate(step.micro_batches)]
        counts = [sum((batch["labels"] != IGNORED).sum() for batch in batches),
                  sum(batch["padding_mask"].sum() for batch in batches)]  # fmt: skip
        weight, tokens = distributed.sum_scalars(counts)
        numbers = {"own": 1.0, "rollout_ms": (time.perf_counter() - clock) * 1e3}
        return Step(batches, weight, int(tokens), numbers)

    def sampled(self, batch: Batch, number: int, micro: int) -> Batch:
        """Return micro-batch `micro` of step `number` with sampled answers."""
        prompts, seeds, context = [], [], self.student.config.max_position_embeddings
        first = (micro * self.world.size + self.world.rank) * len(batch["input_ids"])  # its place in the step
        for row, values in enumerate(zip(*(batch[key] for key in ("input_ids", "labels", "document_ids")))):
            room = self.room
            for place, prompt in enumerate(prompts_of(*values)):
                room -= len(prompt) + self.params.max_new_tokens
                if len(prompt) < context and (room >= 0 or not place):
                    prompts.append(prompt)
                    seeds.append(row_seed(self.seed, number, first + row, place))
        generator = Generator(self.student, self.template.tokenizer.eos_id)
        answers = generator.generate(prompts, self.params, self.template.stop_ids, seeds=seeds)
        rows = [Row(prompt, list(answer), "", []) for prompt, answer in zip(prompts, answers, strict=True)]
        found = collate(rows, [], self.template.tokenizer.pad_id, torch.float32)
        return found | {"own": torch.ones((), dtype=torch.bool)}

    def state_dict(self) -> dict:
        """Return the position in the data, and the number of the next step."""
        return self.given.state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Continue at a saved position."""
        self.steps = state["steps"]
        self.given.load_state_dict(state)


def prompts_of(ids: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor) -> list[list[int]]:
    """Return the ids before the last answer of each dialogue of a row; ids, labels, documents (T,)."""
    found, numbers = [], documents.tolist()
    places = [place for place, number in enumerate(numbers) if number >= 0]
    for _, part in groupby(places, key=numbers.__getitem__):
        part = list(part)
        learned = [label != IGNORED for label in labels[part].tolist()]
        starts = [n for n, now in enumerate(learned) if now and not (n and learned[n - 1])]
        if starts:  # the token at the start of an answer's labels is the last one of its prompt
            found.append(ids[part[: starts[-1] + 1]].tolist())
    return found
