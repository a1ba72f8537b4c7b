"""On-policy distillation: whose tokens have labels, and that nothing but seed, step and place decides."""

import torch

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, row_seed
from load_data.chat.chat_data import encode
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.records import message
from tests.inference.tools import byte_tokenizer, tiny_model
from tests.train.tools import machine, small_config
from train.engine.fine_tuning import chat_source
from train.engine.student_samples import StudentSamples
from utils.distributed import World

TEMPLATE = ChatTemplate(byte_tokenizer())
DIALOGUES = [[message("user", f"q{n}"), message("assistant", "yes" * (n % 3) + "!")] for n in range(12)]
MORE = [message("user", "more"), message("assistant", "so it is")]
DIALOGUES[::4] = [[*turn, *MORE] for turn in DIALOGUES[::4]]
TEXTS = {tuple(TEMPLATE.prompt(turns[:-1])) for turns in DIALOGUES}


def source(student, *settings, rank=0, size=1, rows=4):
    """Packed rows of the dialogues above, and samples of `student` in their place."""
    config = small_config("data.sequence_length=40", f"train.batch_size={rows}", "distill.max_new_tokens=6",
                          "train.seed=3", "distill.task=dialogues",
                          "distill.on_policy=1", *settings)  # fmt: skip
    here = machine(world=World(rank=rank, size=size))
    samples = [encode(TEMPLATE, turns, 41)[0] for turns in DIALOGUES]
    given = chat_source(samples, byte_tokenizer(), config, here)
    return StudentSamples(given, student, TEMPLATE, config, here)


def as_rows(batch):
    """(prompt, sampled ids) of each row, read from the tensors alone."""
    for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["padding_mask"], strict=True):
        at = (labels != -100).nonzero()[:, 0].tolist()
        assert at == list(range(at[0], at[-1] + 1))
        assert real.tolist() == [n <= at[-1] for n in range(len(real))]
        assert ids[at[0] + 1 : at[-1] + 1].tolist() == labels[at[:-1]].tolist()
        yield tuple(ids[: at[0] + 1].tolist()), labels[at].tolist()


def test_labels_are_the_sampled_tokens_alone():
    """The prompts are those of the data, each dialogue once; each answer is what the student writes alone."""
    student = tiny_model()
    step = source(student).next_step()
    (batch,), seen = step.micro_batches, []
    assert batch["own"] and step.numbers["own"] == 1
    rows = list(as_rows(batch))
    assert {prompt for prompt, _ in rows} <= TEXTS and len(rows) > 4  # several of some packed row
    assert step.weight == sum(len(answer) for _, answer in rows)
    assert step.tokens == sum(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    given = source(student, "distill.on_policy=0").next_step().micro_batches[0]
    counts = [len(documents[documents >= 0].unique()) for documents in given["document_ids"]]
    places = [(row, place) for row, count in enumerate(counts) for place in range(count)]
    begins = [tuple(given["input_ids"][row][given["document_ids"][row] == place].tolist())
              for row, place in places]  # fmt: skip
    places = [next(where for where, whole in zip(places, begins, strict=True) if whole[: len(one)] == one)
              for one, _ in rows]  # fmt: skip
    assert len(rows) < len(begins)
    for row in range(len(counts)):  # no more of a row than answers of 6 tokens fit in its 40
        found = [len(prompt) + 6 for (prompt, _), (here, _) in zip(rows, places, strict=True) if here == row]
        assert len(found) == 1 or sum(found) <= 40
        assert [place for here, place in places if here == row] == list(range(len(found))) and found
    generator, params = Generator(student), SamplingParams(max_new_tokens=6)
    for (prompt, answer), (row, place) in zip(rows, places, strict=True):
        seeds = [row_seed(3, 0, row, place)]
        (alone,) = generator.generate([list(prompt)], params, TEMPLATE.stop_ids, seeds=seeds)
        assert answer == list(alone)
        seen.append(answer)
    assert len({*map(tuple, seen)}) > 4


def test_the_share_of_steps_and_an_exact_resume():
    student = tiny_model()
    often = source(student, "distill.on_policy=0.5")
    steps, states = [], []
    for _ in range(24):
        states.append(often.state_dict())
        steps.append(often.next_step())
    own = [bool(step.numbers["own"]) for step in steps]
    assert 5 <= sum(own) <= 19
    assert own == ["own" in step.micro_batches[0] for step in steps]
    again = source(student, "distill.on_policy=0.5")
    for place in (7, own.index(True)):
        again.load_state_dict(states[place])
        found = again.next_step().micro_batches[0]
        assert all(torch.equal(found[key], value) for key, value in steps[place].micro_batches[0].items())
    sample = often.sample()
    assert "own" not in sample.micro_batches[0] and often.state_dict()["steps"] == 24


def test_two_processes_sample_what_one_does(monkeypatch):
    monkeypatch.setattr("utils.distributed.sum_scalars", lambda counts: [float(one) for one in counts])
    student = tiny_model()
    whole = list(as_rows(source(student).next_step().micro_batches[0]))
    parts = [source(student, rank=rank, size=2, rows=2).next_step().micro_batches[0] for rank in (0, 1)]
    assert [row for part in parts for row in as_rows(part)] == whole
