"""What a gate learns from: losses against a loop over single turns with PyTorch's cross-entropy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inference.generation.load import load_adapter, load_full
from load_data.chat.chat_loader import ChatLoader
from load_data.chat.chat_template import ChatTemplate
from load_data.loader import IGNORED
from tests.inference.adapters import MOE, write_adapter, write_base
from tests.inference.tools import byte_tokenizer
from tests.train.tools import machine
from train.gate_train import SelectorEvaluation
from train.engine.selector_data import ROWS, answer_losses, answer_sample, sample, selector_samples, turns_of
from utils.errors import UserError

TOKENIZER = byte_tokenizer()
END = TOKENIZER.special_ids["<|im_end|>"]
CONTEXT = 160
CHATML = {"data": {"template": "chatml"}}


def talk(*contents, system=None):
    """Questions and answers in turn, perhaps after a system message."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


DIALOGUES = [
    talk("a", "one"),
    talk("b?", "", "again", "好"),
    talk("<|im_end|>", "x", "y", "Assistant：", "z", "last", system="be brief"),
]
TURNS = [DIALOGUES[0], DIALOGUES[1][:2], DIALOGUES[1], DIALOGUES[2][:3], DIALOGUES[2][:5], DIALOGUES[2]]


def labelled(candidate, turn):
    """Ids and labels of a turn, as the model gets them."""
    one = answer_sample(candidate, turn)
    return one.ids[:-1].tolist(), np.where(one.targets, one.ids, IGNORED)[1:].tolist()


def silent():
    """A machine of one process that says nothing."""
    one = machine()
    one.say = lambda *words: None
    return one


@pytest.fixture(scope="module", params=["dense", "moe"])
def candidates(request, tmp_path_factory):
    """The base, a LoRA, a prefix and a prompt with another template, another whole model."""
    folder = tmp_path_factory.mktemp("gate")
    shape = {"max_position_embeddings": CONTEXT, **(MOE if request.param == "moe" else {})}
    base = load_full(write_base(folder / "base.pkl", 5, **shape))
    path = base.path
    models = [base, load_adapter(write_adapter(folder / "a.pkl", path, "lora"), base)]
    for like in ("prefix", "prompt"):
        models.append(load_adapter(write_adapter(folder / f"{like}.pkl", path, like, **CHATML), base))
    return [*models, load_full(write_base(folder / "whole.pkl", 6, "Pre", **shape))]


def lone_loss(candidate, turn):
    """The answer's mean loss in a forward of its own, from logits, in fp64."""
    prompt, answer = candidate.template.prompt(turn[:-1]), TOKENIZER.encode(turn[-1]["content"])
    ids = torch.tensor([[*prompt, *answer, END]])
    logits = candidate.model(ids[:, :-1]).logits[0].double()
    nll = F.cross_entropy(logits, ids[0, 1:].clamp(max=logits.shape[1] - 1), reduction="none")
    return nll[len(prompt) - 1 :].mean().item()


def test_losses_are_those_of_each_turn_alone(candidates):
    """More turns than go into one forward, of mixed lengths, so that some rows have padding."""
    turns = [*TURNS, *[talk("q" * n, "w" * (1 + n % 4)) for n in range(14)]]
    table = answer_losses(candidates, turns, silent())
    assert table.shape == (20, 5) and table.dtype == torch.float64 and not table.requires_grad
    for row, turn in zip(table, turns, strict=True):
        assert row.tolist() == pytest.approx([lone_loss(one, turn) for one in candidates], rel=1e-4)
    assert all(len(set(column)) > 15 for column in table.T.tolist())


def test_labels_are_the_last_answer_and_its_end(candidates):
    for candidate in candidates:
        for turn in TURNS:
            ids, labels = labelled(candidate, turn)
            answer = [*TOKENIZER.encode(turn[-1]["content"]), END]
            assert labels == [IGNORED] * (len(ids) - len(answer)) + answer
            whole = candidate.template.dialogue(turn)[0]
            assert [*ids, END] == whole[: len(whole) - whole[::-1].index(END)]


def test_what_a_candidate_cannot_hold_is_left_out(candidates):
    """A dialogue that fits with the template of the base may be too long for another; it then loses its
    oldest turns, and next the beginning of its question, never its answer."""
    old = talk("x" * 60, "y" * 60, "why?", "because")
    long = talk("old", "x", "0123456789" * 14, "w" * 20)
    for candidate in candidates:
        template, room = candidate.template, CONTEXT - candidate.model.prefix_length
        ids, labels = labelled(candidate, old)
        kept = old if template.kind == "tinyseek" else old[2:]
        assert ids == template.dialogue(kept)[0][:-2] and labels.count(IGNORED) == len(ids) - 8
        ids, labels = labelled(candidate, long)
        assert len(ids) == room and labels == [IGNORED] * (room - 21) + [*TOKENIZER.encode("w" * 20), END]
        before, after = template.before["user"], template.after["user"] + template.before["assistant"]
        text = ids[len(before) : room - len(after) - 20]
        assert ids == [*before, *text, *after, *TOKENIZER.encode("w" * 20)]
        assert 90 < len(text) < 140 and text == TOKENIZER.encode(long[2]["content"])[-len(text) :]


@pytest.mark.parametrize("kind", ["tinyseek", "chatml"])
def test_every_answer_that_follows_a_question_is_a_turn(candidates, kind):
    base = candidates[0]
    base.template, before = ChatTemplate(TOKENIZER, kind), base.template
    try:
        assert turns_of(DIALOGUES, base, 1000) == TURNS
        length = len(base.template.dialogue(TURNS[2])[0])
        shorter = [turn for turn in TURNS if len(base.template.dialogue(turn)[0]) <= length]
        assert turns_of(DIALOGUES, base, length) == shorter and TURNS[2] in shorter
        assert TURNS[2] not in turns_of(DIALOGUES, base, length - 1)
    finally:
        base.template = before
    strange = [{"role": "assistant", "content": "I begin"}, *talk("a", "b")]
    assert turns_of([strange], base, 100) == [strange]
    with pytest.raises(UserError, match="no turn of these dialogues fits into data.sequence_length=3"):
        turns_of(DIALOGUES, base, 3)


def test_a_sample_is_the_question_alone_and_the_best_candidate(candidates):
    """As chat batches it: one label in each row, where the answer would begin."""
    base = candidates[0]
    table = torch.tensor([[2.0, 1.0, 3.0], [1.0, 1.0, 2.0], [3.0, 2.0, 1.0]])
    turns = [TURNS[0], TURNS[2], TURNS[5]]
    samples = selector_samples(base, turns, table)
    named = [TOKENIZER.decode(one.ids[:-1].tolist(), skip_special=False) for one in samples]
    assert named == [f"User：{text}\nAssistant：" for text in ("a", "again", "z")]
    for one, best in zip(samples, (1, 0, 2), strict=True):  # of equals the first
        assert one.ids.dtype == np.int32 and one.ids[-1] == best
        assert one.targets.tolist() == [False] * (len(one.ids) - 1) + [True]
    loader = ChatLoader(samples, 24, 3, 1, 0, 1, 0, packing=False, pad_id=TOKENIZER.pad_id)
    loader.start_epoch(0)
    (batch,) = loader.next_step()
    place = batch["labels"] != IGNORED
    assert place.sum(dim=1).tolist() == [1, 1, 1] and sorted(batch["labels"][place].tolist()) == [0, 1, 2]
    marker = TOKENIZER.special_ids["Assistant："]
    assert batch["input_ids"][place].tolist() == [marker] * 3


def test_a_part_of_the_questions_takes_its_share_of_the_time():
    """T9: the engine estimates from `batches` how long a whole evaluation will take."""
    questions, sizes = [sample([1, 2], [0])] * (2 * ROWS + 5), []
    table = torch.rand(len(questions), 2, generator=torch.Generator().manual_seed(0))

    def model(ids):
        sizes.append(len(ids))
        return torch.zeros(*ids.shape, 2)

    evaluation = SelectorEvaluation(questions, table, machine())
    assert evaluation.batches == 3
    for bound, seen in ((1, [ROWS]), (2, [ROWS, ROWS]), (9, [ROWS, ROWS, 5]), (None, [ROWS, ROWS, 5])):
        sizes.clear()
        evaluation(model, bound)
        assert sizes == seen
