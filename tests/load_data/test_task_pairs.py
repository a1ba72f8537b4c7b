"""Tasks as pairs: who is held out, what is cut, and what is left out."""

import pytest

from config.load import load_config
from load_data import task_pairs
from load_data.corpora.python_corpus import PythonCorpus, SourceFile
from load_data.skills.common import SIDES, TEST, TRAIN, VAL
from load_data.skills.verifiers import things
from load_data.tokenization.tokenizer import CharTokenizer
from utils.errors import UserError

TOKENIZER = CharTokenizer("\n" + "".join(map(chr, range(32, 127))))


def source(name, number):
    """A file of one function."""
    text = f'def f{number}(x):\n    """Return {name} {number}. And more.\n\n    Rest."""\n'
    text += f"    return x + {number}\n"
    return SourceFile(f"{name}{number}.py", text)


@pytest.fixture
def corpus(monkeypatch):
    """Ten files to train on and ten held-out ones, one without a sentence and one that is no Python."""
    odd = [SourceFile("odd.py", 'def g():\n    """words without an end that go on"""\n'),
           SourceFile("template.py", "def {name}():\n")]  # fmt: skip
    found = PythonCorpus([source("train", n) for n in range(10)] + odd, [source("val", n) for n in range(10)])
    monkeypatch.setattr(task_pairs, "read_python_corpus", lambda fraction: found)
    return found


def prepare(*settings, task="docstrings"):
    """The pairs of a task, and their texts by side, ends left out."""
    config = load_config(task, list(settings), stage="span_train")
    data = task_pairs.prepare_task(config, TOKENIZER)
    texts = {side: [tuple(TOKENIZER.decode(ids) for ids in pair) for pair in pairs]
             for side, pairs in data.sides.items()}  # fmt: skip
    return data, texts


def test_docstrings_are_held_out_by_file(corpus):
    data, texts = prepare()
    assert sorted(texts[TRAIN])[3] == ("def f3(x):\n    return x + 3", "Return train 3.")
    assert len(texts[TRAIN]) == 10 and len(texts[VAL]) + len(texts[TEST]) == 10 and texts[VAL] and texts[TEST]
    assert all("train" in target for _, target in texts[TRAIN])
    assert all("val" in target for side in (VAL, TEST) for _, target in texts[side])
    assert not any("Return" in code for side in SIDES for code, _ in texts[side])  # the answer is not given
    assert data.digest == prepare()[0].digest != prepare("data.sequence_length=20")[0].digest


def test_a_held_out_pair_is_not_trained_where_another_file_has_it_too(corpus):
    corpus.train.append(SourceFile("copy.py", "import this\n" + source("val", 3).text))
    _, texts = prepare()
    assert len(texts[TRAIN]) == 10 and len(texts[VAL]) + len(texts[TEST]) == 10
    assert not any("val" in target for _, target in texts[TRAIN])


def test_sources_are_cut_and_long_targets_left_out(corpus):
    data, texts = prepare("data.sequence_length=20", "span.target_length=100")
    assert {len(code) for side in SIDES for code, _ in texts[side]} == {18}
    assert max(len(pair.source) for pair in data.sides[TRAIN]) <= 20
    assert "train: 10 pairs, 160 tokens to write; 10 sources cut to 18 tokens, 0 pairs" in data.summary[0]
    with pytest.raises(UserError, match="span.task=docstrings has no train pair"):
        prepare("span.target_length=14")


def test_no_held_out_list_is_trained(monkeypatch):
    """By combination of things, in any order, as the skill has it."""
    monkeypatch.setattr(task_pairs, "SCORED", 40)
    rows = list(task_pairs.lists(load_config("lists", ["data.skill_samples=2000"], stage="span_train")))
    keys = {side: {frozenset(things(text)) for where, text, _ in rows if where == side} for side in SIDES}
    assert [sum(row[0] == side for row in rows) for side in SIDES] == [2000, 40, 40]
    assert not keys[TRAIN] & (keys[VAL] | keys[TEST]) and not keys[VAL] & keys[TEST]
    assert all(repr(things(text)) == answer for _, text, answer in rows)
