"""Exchanges: the budget of thinking kept exactly, and the loop between a model and its tools."""

import json

import pytest

from inference.generation.conversation import Conversation
from inference.generation.exchange import MOST_CALLS, NO_MORE, Request, respond
from inference.generation.generator import Answer, Generator
from inference.generation.sampling import SamplingParams, row_seed
from inference.generation.speculative import SpeculativeGenerator
from inference.generation.text_stream import AnswerStream
from load_data.chat.chat_template import ChatTemplate
from tests.inference.generation.test_conversation import SPECIAL, TEMPLATES, TOKENIZER, loaded, named, talk
from tests.inference.tools import tiny_model
from utils.errors import UserError

TEMPLATE, END = TEMPLATES["tinyseek"], SPECIAL["<|im_end|>"]
GREEDY = SamplingParams(temperature=0, max_new_tokens=60)
PROMPTS = [TEMPLATE.prompt(talk(text), thinking=True) for text in ("12 + 7", "?", "a longer question")]


def called(text):
    """The call of the calculator with an expression."""
    return json.dumps({"name": "calculator", "arguments": {"expression": text}})


class Scripted:
    """Stands for a generator: each row, known by its prompt, writes its answers one after another."""

    def __init__(self, *rows, context=400):
        self.rows, self.scripts, self.asked, self.context = rows, [], [], context

    room = Generator.room

    def generate(self, prompts, params, stop_ids, on_token, must=None, samples=1, **options):
        prompts = [prompt for prompt in prompts for _ in range(samples)]
        self.asked.append([list(prompt) for prompt in prompts])
        self.scripts = self.scripts or [(prompt, iter(row)) for prompt, row in zip(prompts, self.rows)]
        answers = [Answer() for _ in prompts]
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            script = next(script for first, script in self.scripts if prompt[: len(first)] == first)
            for token in next(script):
                forced = must(row, answer) if must else None
                answer.append(token if forced is None else forced)
                on_token(row, answer[-1])
            answer.finish_reason = "stop" if answer[-1:] == [END] else "length"
        return answers


# --- the budget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 7, 200])
def test_the_budget_is_exact(budget):
    """A model with random weights: the same tokens as without a budget, then </think>; shorter thoughts and
    other rows are left alone."""
    close, params = SPECIAL["</think>"], SamplingParams(seed=3, max_new_tokens=20)
    generator = Generator(tiny_model())
    free = generator.generate(PROMPTS, params)
    exchanges = respond(generator, TEMPLATE, PROMPTS, params, Request(True, budget), stop_ids=())
    for alone, exchange in zip(free, exchanges, strict=True):
        ends = alone.index(close) if close in alone else len(alone)
        cut = min(budget, ends)
        assert exchange.ids[:cut] == alone[:cut] and len(exchange.ids) == 20
        assert exchange.thought == (cut if budget < 20 else ends)
        if cut < 20:
            assert exchange.ids[cut] == close
        assert exchange.own == [n != budget or cut < budget for n in range(20)]  # chosen by the model
    assert budget == 200 or any(len(one.ids) > budget + 1 for one in exchanges)  # and the answer goes on


def test_a_thought_that_ends_early_is_not_cut_again():
    written = named("ab", "</think>", "c" * 9, "<|im_end|>")
    (one,) = respond(Scripted([written]), TEMPLATE, PROMPTS[:1], GREEDY, Request(True, 5))
    assert one.ids == written and one.thought == 2
    assert one.messages == [{"role": "assistant", "content": "c" * 9, "thinking": "ab"}]


@pytest.mark.parametrize("penalty, budget", [(1.0, 0), (1.3, 5)])
def test_drafts_keep_the_budget_too(budget, penalty):
    """Greedy tokens with drafts are those without, also after a forced token, which enters both caches."""
    model = tiny_model(mtp="sequential")
    params = SamplingParams(temperature=0, max_new_tokens=24, repetition_penalty=penalty)
    request = Request(True, budget)
    for prompt in PROMPTS:
        plain, drafted = (
            respond(generator, TEMPLATE, [prompt], params, request, stop_ids=())[0].ids
            for generator in (Generator(model), SpeculativeGenerator(model, draft_length=4))
        )
        assert drafted == plain and plain.index(SPECIAL["</think>"]) <= budget


def test_the_budget_is_for_the_whole_exchange():
    """What was thought before a call counts after it."""
    first = named("abcd", "</think>", "<tool_call>", called("1+1"), "</tool_call>", "<|im_end|>")
    second = named("efgh", "x", "<|im_end|>")
    (one,) = respond(Scripted([first, second]), TEMPLATE, PROMPTS[:1], GREEDY, Request(True, 6, True))
    assert one.ids[-6:] == named("ef", "</think>", "hx", "<|im_end|>")
    assert one.thought == 6 and one.messages[-1]["thinking"] == "ef"


# --- the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_its_result_and_the_answer(template, thinking):
    """The ids are those of the template for the whole dialogue, and only the model's are its own: exactly
    those that training supervises."""
    template, text = TEMPLATES[template], called("12 * 34")
    thought = ("hm", "</think>") if thinking else ()
    rows = [named(*thought, "<tool_call>", text, "</tool_call>", "<|im_end|>"),
            named(*thought, "It is 408.", "<|im_end|>")]  # fmt: skip
    prompt, generator = template.prompt(talk("12 * 34"), thinking), Scripted(rows)
    (one,) = respond(generator, template, [prompt], GREEDY, Request(thinking, None, True))
    kept = {"thinking": "hm"} if thinking else {}
    assert one.messages == [
        {"role": "assistant", "content": "", "tool_calls": [text], **kept},
        {"role": "tool", "content": "408"},
        {"role": "assistant", "content": "It is 408.", **kept},
    ]
    ids, targets = template.dialogue(talk("12 * 34") + one.messages)
    assert one.prompt + one.ids + TOKENIZER.encode("\n") == ids
    assert [False] * len(prompt) + one.own + [False] == targets
    assert one.finish_reason == "stop" and sum(one.own) == sum(map(len, rows))


def test_rows_of_a_batch_go_their_own_ways():
    end = ("</tool_call>", "<|im_end|>")
    call = named("<tool_call>", called("6*7"), *end)
    bad = named("<tool_call>", "6*7", "</tool_call>", "<tool_call>", called("1//0"), *end)
    done = named("ok", "<|im_end|>")
    generator = Scripted([done], [call, done], [bad, call, done])
    exchanges = respond(generator, TEMPLATE, PROMPTS, GREEDY, Request(tools=True))
    results = [[m["content"] for m in one.messages if m["role"] == "tool"] for one in exchanges]
    error = 'error: not JSON; a call is {"name": ..., "arguments": {...}}'
    assert results == [[], ["42"], [error, "error: division by zero", "42"]]
    assert [len(one) for one in generator.asked] == [3, 2, 1]
    assert all(one.messages[-1]["content"] == "ok" for one in exchanges)


def test_endless_calls_end():
    """The model is told once that there are no more calls; then the exchange is over."""
    call = named("<tool_call>", called("1"), "</tool_call>", "<|im_end|>")
    generator = Scripted([call] * 99, context=5000)
    (one,) = respond(generator, TEMPLATE, PROMPTS[:1], GREEDY, Request(tools=True))
    results = [message["content"] for message in one.messages if message["role"] == "tool"]
    assert results == ["1"] * MOST_CALLS + [NO_MORE] and one.finish_reason == "calls"
    assert len(generator.asked) == MOST_CALLS + 2 and one.own[-1]


def test_a_full_context_ends_the_loop():
    call = named("<tool_call>", called("1"), "</tool_call>", "<|im_end|>")
    generator = Scripted([call] * 99, context=150)
    (one,) = respond(generator, TEMPLATE, PROMPTS[:1], GREEDY, Request(tools=True))
    assert one.finish_reason == "length" and 1 < len(generator.asked) < MOST_CALLS + 2
    assert all(len(asked[0]) < 150 for asked in generator.asked)


@pytest.mark.parametrize("answer, request_", [
    (named("<tool_call>", called("1"), "</tool_call>"), Request(tools=True)),  # cut before its end
    (named("<tool_call>", called("1")), Request(tools=True)),
    (named("<tool_call>", called("1"), "</tool_call>", "<|im_end|>"), Request()),  # not allowed
    ([], Request(tools=True)),
])  # fmt: skip
def test_what_is_not_run(answer, request_):
    (one,) = respond(Scripted([answer]), TEMPLATE, PROMPTS[:1], GREEDY, request_)
    assert len(one.messages) == 1 and one.ids == answer


def test_random_numbers_differ_after_a_call():
    """Otherwise the answer after a call would repeat the draws of the call."""
    given, call = [], named("<tool_call>", called("1"), "</tool_call>", "<|im_end|>")

    class Remembers(Scripted):
        def generate(self, *rest, seeds, **options):
            given.append(seeds)
            return super().generate(*rest, **options)

    done = named("<|im_end|>")
    for rows in ([[call, call, done]], [[done], [call, call, done]]):
        respond(Remembers(*rows), TEMPLATE, PROMPTS[: len(rows)], SamplingParams(seed=5), Request(tools=True))
    alone, beside = [given[1][0], given[2][0]], [given[4][0], given[5][0]]
    assert given[0] == [5] and given[3] == [5, row_seed(5, 1)]  # those of a generator by itself
    assert len({*alone, *beside, *given[3]}) == 6  # rows 0 and 1
    assert beside == [row_seed(row_seed(5, 1), 0, 1), row_seed(row_seed(5, 1), 0, 2)]


def test_log_probabilities_are_recorded_beside_the_ids():
    """Those of the generator for each id of the model, 0 for those of a tool."""
    model, params = tiny_model(), SamplingParams(seed=3, max_new_tokens=8)
    (alone,) = Generator(model).generate(PROMPTS[:1], params, record=True)
    (one,) = respond(Generator(model), TEMPLATE, PROMPTS[:1], params, stop_ids=(), record=True)
    assert one.ids == alone and one.logprobs == alone.logprobs and len(one.logprobs) == 8

    class Recorded(Scripted):
        def generate(self, *rest, record=False, **options):
            answers = super().generate(*rest, **options)
            for prompt, answer in zip(rest[0], answers):
                answer.logprobs = [-1.0] * len(answer)
                answer.experts = [7] * (len(prompt) + len(answer) - 1)
                answer.experts[3] += len(self.asked) > 1
            return answers

    call = named("<tool_call>", called("1"), "</tool_call>", "<|im_end|>")
    rows = [[call, named("<|im_end|>")]]
    (one,) = respond(Recorded(*rows), TEMPLATE, PROMPTS[:1], GREEDY, Request(tools=True), record=True)
    assert one.logprobs == [-1.0 if own else 0.0 for own in one.own] and 0.0 in one.logprobs
    # the fourth id chose other experts when it was read again: the call and the answer saw different ones
    assert one.experts == [7] * 3 + [-1] + [7] * (len(PROMPTS[0]) + len(one.ids) - 5)


def test_several_samples_of_one_prompt():
    """As the generator draws them: the prompt is read once, and each sample has a seed of its own."""
    model, params = tiny_model(), SamplingParams(seed=3, max_new_tokens=6)
    seeds = [11, 12, 13, 14]
    drawn = Generator(model).generate(PROMPTS[:2], params, samples=2, seeds=seeds)
    drawing = {"samples": 2, "seeds": seeds}
    rows = respond(Generator(model), TEMPLATE, PROMPTS[:2], params, stop_ids=(), **drawing)
    assert [row.ids for row in rows] == drawn and rows[0].ids != rows[1].ids
    assert [row.prompt for row in rows] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]


# --- parts of an answer -----------------------------------------------------------------------------------


def test_parts_are_told_apart_as_they_are_written():
    """Split characters and stop strings stay whole; a stop string in a thought stops nothing."""
    stream = AnswerStream(TOKENIZER, thinking=True, stop=("END",))
    pieces = [stream.push(token) for token in named("é END", "</think>", "你 EN", "<tool_call>", "EN")]
    pieces += [stream.push(token) for token in named("D", "</tool_call>", "so END later")]
    joined = {part: "".join(text for kind, text in pieces if kind == part) for part, _ in pieces}
    assert joined == {"thinking": "é END", "content": "你 ENso ", "call": "END"} and stream.stopped
    message = {"role": "assistant", "content": "你 ENso ", "thinking": "é END", "tool_calls": ["END"]}
    assert stream.message() == message
    assert "�" not in "".join(text for _, text in pieces)


def test_markers_where_they_do_not_belong_are_no_text():
    stream = AnswerStream(TOKENIZER)
    for token in named("a", "</think>", "b", "<think>", "c", "<tool_response>", "</tool_call>", "d"):
        stream.push(token)
    stream.finish()
    assert stream.message() == {"role": "assistant", "content": "abcd"}


# --- a conversation ---------------------------------------------------------------------------------------


def test_a_conversation_keeps_thoughts_and_calls():
    """The answer is shown apart from the rest, and the next prompt is that of the whole dialogue."""
    two = ["<tool_call>", called("1+1"), "</tool_call>"] * 2
    call = named("hm", "</think>", *two, "<|im_end|>")
    final, later = named("so", "</think>", "2", "<|im_end|>"), named("</think>", "x", "<|im_end|>")
    generator, shown, murmured = Scripted([call, final, later]), [], []
    told = Conversation([loaded()], [generator], murmur=murmured.append, request=Request(True, None, True))
    assert told.say("1+1", GREEDY, shown.append) == "2" == "".join(shown)
    assert "".join(murmured) == f"hm\n{called('1+1') * 2}\n-> 2\n-> 2\nso\n"
    roles = [message["role"] for message in told.messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]
    history = list(told.messages)
    told.generators = [Scripted([later])]
    told.say("next", GREEDY, shown.append)
    assert told.generators[0].asked[0] == [TEMPLATE.prompt(history + talk("next"), thinking=True)]
    told.request, told.generators = Request(), [Scripted([call])]
    told.say("again", GREEDY, shown.append)
    assert "/tools on" in told.cut
    assert told.generators[0].asked[0][0][-1] == TEMPLATE.before["assistant"][-1]


def test_an_older_tokenizer_is_told_in_one_line():
    old = type(TOKENIZER)([], parts=())
    template = ChatTemplate(old)
    for request in (Request(thinking=True), Request(tools=True)):
        with pytest.raises(UserError, match="tokenizer of this model has no <tool_call>, so .*pre_train.py"):
            respond(Scripted([]), template, [[5]], GREEDY, request)
    assert template.prompt(talk("hi")) == TEMPLATE.prompt(talk("hi"))
    with pytest.raises(UserError, match="budget of -1"):
        Request(budget=-1)
