"""Distillation by text: what the student is given to learn, of what a teacher wrote."""

import re

import pytest

from inference.generation.load import load_full
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.records import message
from load_data.corpora.reserved import is_reserved
from load_data.tokenization.tokenizer import BpeTokenizer
from tests.inference.tools import byte_tokenizer, write_checkpoint
from tests.train.tools import small_config
from train.engine import teacher_answers
from train.engine.teacher_answers import prepare_answers, working_of
from utils.errors import UserError

TERMS = re.compile(r"([0-9]+) ?(\+|-|plus|minus|加|减) ?([0-9]+)")
STUDENT = BpeTokenizer([("W", "h"), ("i", "s")])  # other ids for the same text than the teacher's


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Random weights, trained to answer as far as the file says; answers often end soon."""
    loaded = load_full(write_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher.pkl", "SFT"))
    loaded.model.lm_head.weight.data[STUDENT.special_ids["<|im_end|>"]] *= 2
    return loaded


def prepared(teacher, cache, *settings, tokenizer=STUDENT, paths="skills:arithmetic"):
    """The data of a student that reads by `tokenizer`."""
    fixed = [f"data.cache_dir={cache}", f'data.paths=["{paths}"]', "data.limit=null"]
    fixed += ["data.sequence_length=90", "model.vocab_size=300"]
    fixed += ["distill.task=dialogues", "distill.questions=40", "distill.max_new_tokens=9"]
    config = small_config(*fixed, *settings)
    return prepare_answers(config, ChatTemplate(tokenizer), teacher, "cpu")


def value(question: str) -> int:
    """The value of the sum in a question, by a rule of this file."""
    left, sign, right = TERMS.search(question).groups()
    return int(left) + int(right) * (1 if sign in ("+", "plus", "加") else -1)


def scripted(generator, template, items, config):
    """A teacher that is right, wrong, unfinished, or right beside a sum that is reserved for scoring."""
    reserved = next(f"{n} + 1" for n in range(99) if is_reserved(f"{n} + 1"))
    for number, item in enumerate(items):
        working, label = working_of(item.skill, message("assistant", item.expected))
        texts = [item.expected, f"{working}: {int(label) + 1}", None, f"as {reserved} says: {label}"]
        yield item, texts[number % 4] and message("assistant", texts[number % 4])


def test_no_wrong_solution_passes_and_both_tasks_are_marked(teacher, tmp_path, monkeypatch):
    """A kept question is asked twice: with `<think>`, and the working is learned, or for the value alone."""
    monkeypatch.setattr(teacher_answers, "written_answers", scripted)
    data = prepared(teacher, tmp_path, "distill.answers=solutions")
    found = list(data.dialogues("train"))
    assert data.summary[0].startswith("arithmetic: 40 questions; solutions: 10 kept, 10 wrong, 10 unfinished")
    assert len(found) == 20 and len(data.train) == 20
    think, end_think, end = (STUDENT.special_ids[name] for name in ("<think>", "</think>", "<|im_end|>"))
    for number in range(0, 20, 2):
        (asked, worked), (again, at_once) = found[number : number + 2]
        assert asked == again and str(value(asked["content"])) == worked["content"] == at_once["content"]
        assert "thinking" in worked and "thinking" not in at_once
        for sample, marked in zip((data.train[number], data.train[number + 1]), (True, False), strict=True):
            ids, learned = sample.ids.tolist(), sample.ids[sample.targets].tolist()
            assert (think in ids) == (end_think in learned) == marked and think not in learned
            text = STUDENT.decode(learned, skip_special=False)
            assert text == f"{worked['thinking']}</think>" * marked + f"{at_once['content']}<|im_end|>"
            assert learned[-1] == end
    assert any(worked["thinking"] for _, worked in found[::2])
    assert sum("thinking" in messages[-1] for messages in data.dialogues("val")) * 2 == len(data.val)


def test_the_teacher_may_be_wrong_but_not_unfinished(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_answers, "written_answers", scripted)
    data = prepared(teacher, tmp_path, "distill.answers=teacher")
    found = [answer["content"] for _, answer in data.dialogues("train")]
    assert len(found) == 20  # as it was written, in one dialogue each
    labels = prepared(None, tmp_path, "distill.answers=labels")
    values = [(value(asked["content"]), answer["content"]) for asked, answer in labels.dialogues("train")]
    assert len(values) == 40 and all(str(true) == label for true, label in values)
    assert found[0] != values[0][1] and found[0].endswith(values[0][1])


def test_a_limit_is_that_of_all_skills(tmp_path):
    settings = ("distill.answers=labels", "data.limit=6")
    data = prepared(None, tmp_path, *settings, paths="skills:arithmetic,thought_sums")
    assert len(data.train) == 6
    assert data.summary[0].startswith("arithmetic: 3 questions")


def test_no_held_out_question_is_asked(teacher, tmp_path, monkeypatch):
    """By the key of the sum in each question, which this test reads itself; those of validation are."""
    monkeypatch.setattr(teacher_answers, "written_answers", scripted)

    def reserved(side):
        terms = [TERMS.search(asked["content"]).groups() for asked, _ in data.dialogues(side)]
        signs = {"plus": "+", "加": "+", "minus": "-", "减": "-"}
        return [is_reserved(f"{left} {signs.get(sign, sign)} {right}") for left, sign, right in terms]

    data = prepared(teacher, tmp_path, "distill.answers=teacher", "distill.questions=1000")
    assert len(data.train) == 500 and not any(reserved("train")) and all(reserved("val"))


def test_answers_are_repeatable_and_kept(teacher, tmp_path, monkeypatch):
    """The same for the same teacher and seed, whatever the batch; asked once; others for another seed."""
    whole, calls = teacher_answers.written_answers, []
    monkeypatch.setattr(teacher_answers, "written_answers", lambda *given: calls.append(1) or whole(*given))
    settings = ("distill.answers=teacher", "distill.answer_temperature=1", "distill.questions=9")
    first = prepared(teacher, tmp_path / "a", *settings)
    assert prepared(teacher, tmp_path / "a", *settings).digest == first.digest and len(calls) == 1
    monkeypatch.setattr(teacher_answers, "QUESTIONS", 4)
    again = prepared(teacher, tmp_path / "b", *settings)
    assert again.digest == first.digest and len(calls) == 2
    assert prepared(teacher, tmp_path / "a", *settings, "train.seed=1").digest != first.digest
    byte = prepared(teacher, tmp_path / "a", *settings, tokenizer=byte_tokenizer())
    assert byte.digest != first.digest and list(byte.dialogues("train")) == list(first.dialogues("train"))


def test_what_cannot_be_asked_is_one_line(teacher, tmp_path):
    for path in ("python", "skills:nothing"):
        with pytest.raises(UserError, match="--data"):
            prepared(teacher, tmp_path, "distill.answers=teacher", paths=path)
    with pytest.raises(UserError, match="worked out no right answer to 40 questions of ari.*; raise"):
        prepared(teacher, tmp_path, "distill.answers=solutions")
    teacher.answers = False
    with pytest.raises(UserError, match="a model of sft, which was not trained to answer; name a fine-tuned"):
        prepared(teacher, tmp_path, "distill.answers=teacher")
    teacher.answers = True
