"""Thinking and tools from the command line: in chat, and in scores."""

import sys

import pytest

from inference.evaluate import score_skills
from inference.generation.conversation import prompt_within
from inference.generation.exchange import Request, respond
from inference.generation.generator import Generator
from inference.generation.load import load_full
from inference.generation.sampling import SamplingParams
from inference.generation.terminal import murmur
from load_data.tokenization.tokenizer import BpeTokenizer
from tests.inference.adapters import write_base
from tests.inference.generation.test_conversation import TOKENIZER, named, talk
from tests.inference.generation.test_exchange import TEMPLATE, Scripted, called
from tests.inference.generation.test_terminal import Terminal
from tests.inference.test_chat import run
from tests.inference.tools import write_checkpoint

FLAGS = ["--temperature", 0, "--max-new-tokens", 12]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model with random weights that answers."""
    return write_base(tmp_path_factory.mktemp("out") / "a.pkl", 5, max_position_embeddings=512)


def expected(path, request):
    """What the model of `path` thinks and answers to `hi`."""
    model = load_full(path)
    params = SamplingParams(temperature=0, max_new_tokens=12)
    prompt = TEMPLATE.prompt(talk("hi"), request.thinking)
    return respond(Generator(model.model), TEMPLATE, [prompt], params, request)[0].messages[-1]


def test_the_thought_is_shown_apart_and_only_the_answer_is_output(monkeypatch, capsys, path):
    message = expected(path, Request(True, 4))
    assert message["thinking"] and message["content"]
    assert message["content"] != expected(path, Request())["content"]
    flags = [*FLAGS, "--think", "--think-budget", 4, "--prompt", "hi"]
    code, out, err = run(monkeypatch, capsys, "--checkpoint", path, *flags)
    assert code == 0 and out == message["content"] + "\n"
    assert "(thinking on)\n" + message["thinking"] in err


@pytest.mark.parametrize("room", [40, 60])
def test_a_long_question_leaves_room_for_the_marker(room):
    ids = prompt_within(TEMPLATE, talk("a long question " * 20), room, thinking=True)
    assert len(ids) == room and ids[-1] == TEMPLATE.part("<think>")


def test_the_switch_is_per_message(monkeypatch, capsys, path):
    """`/think on` changes the next prompt, `/think off` gives today's form again; wrong words are told."""
    given, real = [], Generator.generate

    def noted(self, rows, *rest, **options):
        given.extend(rows)
        return real(self, rows, *rest, **options)

    monkeypatch.setattr(Generator, "generate", noted)
    typed = "hi\n/think on\n/clear\nhi\n/clear\n/think off\nhi\n/think maybe\n/tools on\n/tools off\n/tools"
    code, out, err = run(monkeypatch, capsys, "--checkpoint", path, *FLAGS, typed=typed)
    plain, thinking = TEMPLATE.prompt(talk("hi")), TEMPLATE.prompt(talk("hi"), thinking=True)
    assert code == 0 and given == [plain, thinking, plain] and thinking[:-1] == plain
    assert "/think takes on or off" in err and "/tools takes on or off" in err
    assert "(tools on)" in err and "(tools off)" in err


@pytest.mark.parametrize("flags", [["--think"], ["--tools"]])
def test_models_that_cannot_are_told_apart(monkeypatch, capsys, tmp_path, flags):
    """A pre-trained model, and one with a tokenizer from before thinking: one clear line each."""
    old = write_checkpoint(tmp_path / "old.pkl", "SFT", tokenizer=BpeTokenizer([], parts=()).to_json())
    pre = write_checkpoint(tmp_path / "pre.pkl")
    cases = (old, "tokenizer of this model has no <tool_call>"), (pre, "only fine-tuned models think")
    for path, words in cases:
        code, out, err = run(monkeypatch, capsys, "--checkpoint", path, "--prompt", "hi", *flags)
        assert code == 2 and out == "" and words in err and "Traceback" not in err
    code, _, err = run(monkeypatch, capsys, "--checkpoint", old, "--prompt", "hi", *FLAGS)
    assert code == 0 and "answers" in err


def test_a_negative_budget_is_refused(monkeypatch, capsys, path):
    code, _, err = run(monkeypatch, capsys, "--checkpoint", path, "--prompt", "hi", "--think-budget", -1)
    assert code == 2 and "a budget of -1 thinking tokens" in err


def test_murmurs_are_dim_and_end_no_line(monkeypatch):
    for name, value in {"TERM": "xterm", "NO_COLOR": "", "WT_SESSION": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", Terminal())
    for piece in ("7,8", "", "=15\x1b"):
        murmur(piece)
    assert sys.stderr.getvalue() == "\x1b[2m7,8\x1b[0m\x1b[2m=15\\x1b\x1b[0m"


@pytest.mark.parametrize("skill, request_, rows, answer", [
    ("thought_sums", Request(True, 64), [named("1" * 30, "</think>", "no idea", "<|im_end|>")], "no idea"),
    ("tool_sums", Request(tools=True), [named("<tool_call>", called("1+1"), "</tool_call>", "<|im_end|>"),
                                        named("x", "<|im_end|>")], "x"),
])  # fmt: skip
def test_a_score_counts_the_answer_alone(skill, request_, rows, answer):
    """The thought is no part of it, nor is a call; only a request with thinking asks for it."""
    generator = Scripted(*[rows] * 5, context=5000)
    score = score_skills(generator, TEMPLATE, [skill], 5, request=request_)[skill]
    assert score.wrong[1] == answer and score.of == 5 and len(generator.asked) == len(rows)
    asked = {TOKENIZER.decode(prompt[-1:], skip_special=False) for prompt in generator.asked[0]}
    assert asked == {"<think>" if request_.thinking else "Assistant："}
