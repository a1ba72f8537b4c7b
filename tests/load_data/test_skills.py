"""Skills: nothing held out is ever trained on, and every answer checked in a way of the test's own."""

import ast
import importlib
import inspect
import re

import pytest

from load_data.corpora.python_corpus import PythonCorpus
from load_data.corpora.reserved import is_reserved
from load_data.skills import (
    SFT_SKILLS,
    SKILLS,
    Item,
    docstrings,
    held_out_dialogues,
    identity,
    is_right,
    lists,
    scored_items,
    training_dialogues,
    training_items,
)
from load_data.skills.common import Sample, side_of
from load_data.skills.docstrings import entry, first_sentence
from utils.errors import UserError

CHINESE = re.compile("[\u4e00-\u9fff]")
SUM = re.compile(r"(?<![\w.])(\d{1,2})\s*([+-])\s*(?=(\d{1,2})(?!\w|[.]\d))")
MODULES = {"textwrap", "json", "string", "queue", "shlex", "calendar", "csv", "shutil", "copy"}
WORDED = re.compile(r"(\d+) (?:and|plus|minus|加|减) (\d+)")


@pytest.fixture(scope="module", autouse=True)
def one_reading(library):
    """Let the skill docstrings use what the other tests read: some files to train on, all held-out ones."""
    names = [file.name.split("/")[0].removesuffix(".py") for file in library.train]
    some = [file for n, file in enumerate(library.train) if n % 4 == 0 or names[n] in MODULES]
    library = PythonCorpus(some, library.val)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "read_python_corpus", lambda fraction: library)
        docstrings.entries.cache_clear()
        yield


@pytest.fixture(scope="module")
def dialogues(one_reading):
    """A part of one epoch of fine-tuning."""
    return list(training_dialogues(SFT_SKILLS, 12_000, 0))


@pytest.fixture(scope="module")
def trained(dialogues):
    """Every question of it with its answer."""
    return [(d[n]["content"], d[n + 1]["content"]) for d in dialogues for n in range(0, len(d), 2)]


@pytest.fixture(scope="module")
def unseen():
    """Many test items of each skill."""
    return {name: scored_items(name, 400, 0) for name in SKILLS}


def pairs_of(items):
    return [(item.messages[-1]["content"], item.expected) for item in items]


def samples(name, items, count=1500):
    """Questions and answers of one skill, of all sides."""
    train = [(d[n]["content"], d[n + 1]["content"])
             for d in training_dialogues([name], count, 3) for n in range(0, len(d), 2)]  # fmt: skip
    held_out = [(d[0]["content"], d[1]["content"]) for d in held_out_dialogues([name], 200, 0)]
    return train + held_out + pairs_of(items[name])


def sums_in(text):
    """Every sum of two small numbers that can be read in a text, in signs or in words, as `a + b`."""
    found = {f"{a} {sign} {b}" for a, sign, b in SUM.findall(text)}
    for a, b in WORDED.findall(text):
        found.add(f"{a} {'-' if re.search('minus|减', text) else '+'} {b}")
    return found


def written(question):
    """The expression in a question about one."""
    return re.sub(r"^(?:>>> |.*?`)|`.*$", "", question)


# --- dialogues --------------------------------------------------------------------------------------------


def test_dialogues_are_turns_of_user_and_assistant(dialogues):
    assert len(dialogues) == 12_000
    for messages in dialogues:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"] and m["content"] == m["content"].strip() for m in messages)
    turns = [len(messages) // 2 for messages in dialogues]
    assert set(turns) == {1, 2, 3} and 0.2 < 1 - turns.count(1) / len(turns) < 0.3


def test_the_arguments_decide(dialogues):
    assert list(training_dialogues(SFT_SKILLS, 300, 0)) == dialogues[:300]
    assert list(training_dialogues(SFT_SKILLS, 300, 1)) != dialogues[:300]
    assert list(training_dialogues(SFT_SKILLS, 0, 0)) == []
    names = ("naming", "lists")
    assert held_out_dialogues(names, 9, 4) == held_out_dialogues(names, 9, 4)
    assert held_out_dialogues(names, 9, 4) != held_out_dialogues(names, 9, 5)
    assert scored_items("lists", 9, 4) == scored_items("lists", 9, 4) != scored_items("lists", 9, 5)


def test_the_seed_means_the_same_in_every_process():
    """Not Python's own hash, which differs from process to process."""
    questions = [messages[0]["content"] for messages in training_dialogues(["arithmetic"], 3, 0)]
    assert questions == [">>> 66-1", "What is 89-82?", "What is 84 - 77?"]


def test_only_the_named_skills_are_trained():
    for messages in training_dialogues(["shopping"], 50, 0):
        assert all(m["content"][0] == m["content"][-1] == "|" for m in messages[1::2])


@pytest.mark.parametrize("call", [
    lambda: next(training_dialogues(["naps"], 1, 0)), lambda: held_out_dialogues(["naps"], 1, 0),
    lambda: scored_items("naps", 1, 0), lambda: is_right(Item("naps", [], ""), ""),
    lambda: next(training_items(["naps"], 0)),
])  # fmt: skip
def test_an_unknown_skill_is_named(call):
    with pytest.raises(UserError, match="unknown skill 'naps'; skills: identity, arithmetic"):
        call()


def test_items_are_distinct_and_as_many_as_asked(unseen):
    for name, items in unseen.items():
        assert len({item.messages[-1]["content"] for item in items}) == len(items), name
        assert len(items) == 400 or name in ("identity", "docstrings")
        assert all(item.skill == name and [m["role"] for m in item.messages] == ["user"] for item in items)
        assert all(is_right(item, item.expected) for item in items)
        assert not any(is_right(item, wrong) for item in items for wrong in ("", "42 apples", "I am GPT."))
        assert [len(scored_items(name, count, 0)) for count in (0, 7)] == [0, 7]
    assert len(unseen["identity"]) > 60
    assert len({frozenset(sums_in(item.messages[0]["content"])) for item in unseen["arithmetic"]}) == 400
    assert len(held_out_dialogues(("lists", "naming"), 30, 0)) == 60


# --- sides ------------------------------------------------------------------------------------------------


def test_no_reserved_sum_is_in_the_training_text(dialogues):
    """Of any skill, inside larger expressions, in docstrings, without spaces, in words."""
    reserved = [one for d in dialogues for m in d for one in sums_in(m["content"]) if is_reserved(one)]
    assert reserved == []


def test_no_part_of_a_training_expression_is_reserved():
    worked_out = (ast.BinOp, ast.Compare, ast.Call, ast.Subscript, ast.BoolOp)
    questions = {m["content"] for d in training_dialogues(["expressions"], 4000, 0) for m in d[::2]}
    assert len(questions) > 4000
    for expression in map(written, questions):
        nodes = ast.walk(ast.parse(expression, mode="eval"))
        parts = [ast.unparse(node) for node in nodes if isinstance(node, worked_out)]
        assert not any(map(is_reserved, (expression, *parts))), expression


def keys(name, pairs):
    """What identifies each question, found without the skill's own keys."""
    for question, answer in pairs:
        if name in ("arithmetic", "thought_sums"):
            yield from sums_in(question)
        elif name == "tool_sums":
            yield re.search(r"[(]*\d[\d +*/%()-]*|$", question)[0].strip()
        elif name == "sums":
            numbers = re.findall(r"\d+", question)
            yield ("-", *numbers) if "-" in question else tuple(sorted(numbers))
        elif name == "lists":
            yield frozenset(ast.literal_eval(answer))
        elif name == "expressions":
            yield written(question)
        elif name == "shopping":
            cells = answer.strip("|").split("|")
            yield frozenset(zip(cells[::2], cells[1::2], strict=True))
        elif name == "naming":
            yield tuple(re.findall("[a-z]+", snake(answer)))
        elif name == "docstrings":
            yield re.search("`(.*)`", question)[1]
        else:
            yield re.sub(r"\W", "", question.lower())


@pytest.mark.parametrize("name", SKILLS)
def test_sides_are_disjoint(name, dialogues, trained, unseen):
    if name not in SFT_SKILLS:
        epoch = training_dialogues([name], 5000, 0)
        trained = [(d[n]["content"], d[n + 1]["content"]) for d in epoch for n in range(0, len(d), 2)]
    elif name == "lists":
        trained = [(q, a) for q, a in trained if a.startswith("['")]
        trained = [(q, a) for q, a in trained if "`" not in q and ">>>" not in q]
    test = set(keys(name, pairs_of(unseen[name])))
    held_out = [(d[0]["content"], d[1]["content"]) for d in held_out_dialogues([name], 400, 0)]
    val = set(keys(name, held_out))
    everything = {q for q, _ in trained}
    assert len(test) > 50 and len(val) > 40 and not test & val
    if name in ("expressions", "docstrings", "identity"):
        seen = {part for q in everything for part in (written(q), re.sub(r"\W", "", q.lower()))}
        seen |= {name for q in everything for name in re.findall("`(.*)`", q)}
    else:
        seen = set(keys(name, trained))
    assert len(seen) > 1000 and not seen & (test | val)
    texts = " ".join(everything)
    if name == "expressions":
        assert not any(f"`{key}`" in texts for key in test)


def test_the_first_questions_of_all_are_trained():
    """Held out by accident, they would be what everybody asks first."""
    questions = {messages[0]["content"] for messages in training_dialogues(["identity"], 4000, 0)}
    assert {
        "你是谁？",
        "Who are you?",
        "What is your name?",
        "你叫什么名字？",
        "Are you ChatGPT?",
    } <= questions


def test_question_and_answer_make_no_sum_together():
    """Every sum that is not reserved can be trained, also one whose answer begins with a sign."""
    sums = [(f"{a} - {b}", str(a - b)) for a in range(30) for b in range(30)]
    assert all((side_of(Sample(q, q, answer)) == "train") != is_reserved(q) for q, answer in sums)


def test_some_identity_questions_are_held_out_with_every_opening():
    """So that not every test question is a known one after another greeting."""
    questions = [m["content"].lower() for d in training_dialogues(["identity"], 10_000, 0) for m in d[::2]]
    cores = [core.lower()[:-1] for pairs in identity.QUESTIONS.values() for core, _ in pairs]
    unseen = [core for core in cores if not any(core in question for question in questions)]
    assert 4 <= len(unseen) <= 20


# --- answers ----------------------------------------------------------------------------------------------


def test_identity_names_tinyseek_in_the_language_of_the_question(unseen):
    pairs = samples("identity", unseen)
    assert len({question for question, _ in pairs}) > 1200
    for question, answer in pairs:
        assert "TinySeek" in answer and bool(CHINESE.search(question)) == bool(CHINESE.search(answer))
    for item in unseen["identity"]:  # naming TinySeek is not enough (D6)
        wrong = ("Yes, TinySeek, ChatGPT, whatever", "TinySeek 是", item.expected.lower(), item.expected[:-2])
        assert is_right(item, item.expected + "\n") and not any(is_right(item, one) for one in wrong)
    for language in ("en", "zh"):
        cores = identity.QUESTIONS[language]
        assert len({core for core, _ in cores}) == len(cores) >= 40
        assert len(set(identity.OPENINGS[language])) * len(cores) >= 600


WORKING = re.compile(r"(- )?(\d+),(\d+)=(\d+) ([1-9](?:,[1-9])*)=(\d+): (-?\d+)")


def test_arithmetic_is_right(unseen):
    """The value, and every column of the working: units, then tens with what is carried or borrowed."""
    pairs = samples("arithmetic", unseen)
    kinds = set()
    for question, answer in pairs:
        ((left, sign, right),) = (one.split() for one in sums_in(question))
        a, b = int(left), int(right)
        value = a + b if sign == "+" else a - b
        if a < 10 and b < 10:
            assert answer == str(value)
            continue
        swapped, *units, column, tens, said = WORKING.fullmatch(answer).groups()
        assert int(said) == value and bool(swapped) == (value < 0)
        large, small = (b, a) if swapped else (a, b)
        first, second, unit = map(int, units)
        column = list(map(int, column.split(",")))
        ones = large % 10 + small % 10 if sign == "+" else large % 10 - small % 10
        moved = ones > 9 or ones < 0  # a ten is carried, or borrowed
        assert second == small % 10 and first == large % 10 + 10 * (ones < 0)
        assert unit == (first + second if sign == "+" else first - second)
        assert column == [one for one in (large // 10, small // 10, moved) if one]
        rest = sum(column[bool(large // 10) :])
        head = large // 10
        assert int(tens) == (head + rest if sign == "+" else head - rest)
        assert abs(value) == 10 * int(tens) + unit % 10
        kinds.add((sign, moved, bool(swapped)))
    assert len(kinds) == 6  # carried or not; borrowed or not, from the first number or the second
    one_digit = [q for q, _ in pairs if re.fullmatch(r"\D*\d\D+\d\D*", q)]
    assert 0.07 < len(one_digit) / len(pairs) < 0.2
    assert 0.4 < sum("-" in q or "减" in q or "minus" in q for q, _ in pairs) / len(pairs) < 0.6


def test_is_right_wants_the_whole_answer():
    item = Item("arithmetic", [{"role": "user", "content": "12 + 7"}], "19")
    assert is_right(item, "19") and is_right(item, " 19\n")
    assert not any(is_right(item, answer) for answer in ("1", "190", "19.", "119", "12 + 7 = 19"))
    worked = Item("arithmetic", item.messages, "2,7=9 1=1: 19")
    assert is_right(worked, "2,7=9 1=1: 19") and is_right(worked, "another way: 19")
    assert not any(is_right(worked, answer) for answer in ("2,7=9 1=1: 18", "2,7=9 1=1:", "19: 1", "2,7=9"))


def test_lists_are_those_of_the_sentence(unseen):
    """All words of the pools that stand in the sentence, in their order: the frames have none of them."""
    pairs = samples("lists", unseen)
    pools = {True: [], False: []}
    for language in (lists.ENGLISH, lists.CHINESE):
        for words, sentences in language.values():
            pools[language is lists.CHINESE] += words.split()
            assert sentences.count("|") >= 4
    for pool in pools.values():
        assert len(set(pool)) == len(pool) >= 110
    for question, answer in pairs:
        things = ast.literal_eval(answer)
        assert repr(things) == answer and 1 <= len(things) <= 5
        if CHINESE.search(question):
            found = "、".join(things)
            assert found in re.sub("[和、]", "、", question)
            before, after = re.sub("[和、]", "、", question).split(found, 1)
            assert not before.endswith("、") and not after.startswith("、")
        else:
            pool = sorted(pools[False], key=len, reverse=True)
            assert things == re.findall(rf"\b(?:{'|'.join(pool)})\b", question), question
    assert {len(ast.literal_eval(answer)) for _, answer in pairs} == {1, 2, 3, 4, 5}


def test_expressions_are_what_python_says(unseen):
    pairs = samples("expressions", unseen)
    for question, answer in pairs:
        assert repr(eval(written(question))) == answer, question  # noqa: S307 - the generator's own
        assert not re.fullmatch(r"\d{1,2} [+-] \d{1,2}", written(question))  # that is arithmetic


def test_docstrings_are_those_of_the_modules(unseen):
    """The interpreter's own signatures and docstrings, where a module can be imported without a fuss."""
    seen = set()
    for question, answer in samples("docstrings", unseen, 12_000):
        name = re.search("`(.*)`", question)[1]
        assert not any(part.startswith("_") for part in name.split("."))
        parts = name.split(".")
        if parts[0] not in MODULES or (question, answer) in seen:
            continue
        seen.add((question, answer))
        found = importlib.import_module(parts[0])
        for part in parts[1:]:
            if not hasattr(found, part):
                break
            found = getattr(found, part)
        else:
            if answer.startswith(name + "("):
                parameters = inspect.signature(found).parameters
                args = ast.parse(f"def f{answer.removeprefix(name)}: pass").body[0].args
                named = [
                    a for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a
                ]
                assert [a.arg for a in named] == list(parameters)
            else:
                assert " ".join(inspect.getdoc(found).split()).startswith(answer)
                assert answer[-1] in ".!?" and len(answer.split()) <= 20
    assert len(seen) > 60


def test_first_sentences():
    assert first_sentence("Do it. Do more.") == "Do it."
    assert first_sentence("Do it, i.e. begin\nnow.\n\nMore. And more.") == "Do it, i.e. begin now."
    assert first_sentence("See a.b for (x.y). It") == "See a.b for (x.y)."
    assert first_sentence("A title") == first_sentence("Words " * 20 + "end.") == ""
    assert first_sentence("Why? Because.") == "Why?"


def test_what_is_private_long_or_reserved_is_no_entry():
    assert entry("m.f(a)\nGives 1 + 7. More.\n") == ("m.f", "Gives 1 + 7.", "m.f(a)")
    assert entry("class m.C\nA thing.\n") == ("m.C", "A thing.", "")
    assert is_reserved("1 + 8") and not is_reserved("1 + 7")
    for document in ("m.f(a)\nGives 1 + 8.", "m.f(a=1+8)\nGives.", "m._f(a)\nGives.", "class m.C\nA title"):
        assert entry(document + "\n") is None


def test_shopping_tables(unseen):
    numbers = "one|two|three|four|five|six|seven|eight|nine|ten"
    for question, answer in samples("shopping", unseen):
        said = re.findall(rf"\b((?:{numbers}) \w+) of (\w+)", question)
        assert answer == "".join(f"|{good}|{amount}" for amount, good in said) + "|"
        assert all((amount.split()[0] == "one") != bool(re.search("s$", amount)) for amount, _ in said)


def snake(name):
    """Any style as snake_case."""
    name = name.replace("-", "_")
    return name.lower() if name.isupper() else re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name)


def test_names_in_their_styles(unseen):
    shapes = {
        "snake_case": "[a-z]+(_[a-z]+)+", "kebab-case": "[a-z]+(-[a-z]+)+",
        "CONSTANT_CASE": "[A-Z]+(_[A-Z]+)+", "camelCase": "[a-z]+([A-Z][a-z]+)+",
    }  # fmt: skip
    met = set()
    for question, answer in samples("naming", unseen):
        name = re.search("`(.*)`", question)[1]
        style = next(style for style in shapes if question.rstrip(".?").endswith(style))
        assert re.fullmatch(shapes[style], answer) and name != answer and snake(name) == snake(answer)
        met.add(style)
    assert met == set(shapes)
