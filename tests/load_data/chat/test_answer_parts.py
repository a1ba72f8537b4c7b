"""Thinking, calls and results in the template: exact ids and masks, and nothing said can become a marker.
The ids are held against a Jinja template, which Hugging Face encodes."""

import itertools
import json
import re

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from load_data.chat.chat_template import ChatTemplate, cut_turn, fit_turns
from load_data.chat.records import message
from load_data.skills import as_turn, held_out_dialogues, scored_items, tool_sums, training_dialogues
from load_data.skills.common import Sample
from load_data.tokenization.tokenizer import PART_TOKENS, BpeTokenizer
from inference.tools.calculator import calculate
from tests.load_data.chat.test_chat_template import AWKWARD, FORGED, KINDS, pieces
from utils.errors import UserError

CALL = {"name": "calculator", "arguments": {"expression": "12 * 34，é"}}
JINJA = {
    "tinyseek": (
        "{% for one in messages %}{% if one.role == 'tool' %}"
        "{{ '<tool_response>' + one.content + '</tool_response>\n' }}"
        "{% elif one.role == 'user' %}{{ 'User：' + one.content + '\n' }}"
        "{% else %}{{ 'Assistant：' }}ANSWER{{ '\n' }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for one in messages %}{% if one.role == 'tool' %}"
        "{{ '<|im_start|>user\n<tool_response>' + one.content + '</tool_response><|im_end|>\n' }}"
        "{% elif one.role == 'user' %}{{ '<|im_start|>user\n' + one.content + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>assistant\n' }}ANSWER{{ '\n' }}{% endif %}{% endfor %}"
    ),
}
ANSWER = (
    "{% if one.thinking is defined %}{{ '<think>' }}{% endif %}{% generation %}"
    "{% if one.thinking is defined %}{{ one.thinking + '</think>' }}{% endif %}{{ one.content }}"
    "{% for call in one.tool_calls or [] %}"
    "{{ '<tool_call>' }}{{ call | tojson }}{{ '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
)
USED = [
    message("user", "12 * 34"),
    message("assistant", "") | {"thinking": "too hard", "tool_calls": [CALL, CALL]},
    message("tool", "408"),
    message("tool", "error: 你"),
    message("assistant", "It is 408.") | {"thinking": ""},
    message("user", "why"),
    message("assistant", "because"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_mask_are_those_of_hugging_face(bpe, kind):
    data = json.loads(bpe.backend.to_str())
    data["model"]["vocab"] |= bpe.special_ids
    fast = tokenizers.Tokenizer.from_str(json.dumps(data))
    fast.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in bpe.special_ids])
    jinja = JINJA[kind].replace("ANSWER", ANSWER)
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=jinja)
    found = theirs.apply_chat_template(USED, return_dict=True, return_assistant_tokens_mask=True)
    ids, targets = ChatTemplate(bpe, kind).dialogue(USED)
    assert ids == found["input_ids"] and [int(one) for one in targets] == found["assistant_masks"]


def test_golden_parts(bpe):
    call = json.dumps(CALL, ensure_ascii=False)
    assert pieces(ChatTemplate(bpe), USED) == [
        (False, "User：12 * 34\nAssistant：<think>"),
        (True, f"too hard</think><tool_call>{call}</tool_call><tool_call>{call}</tool_call><|im_end|>"),
        (False, "\n<tool_response>408</tool_response>\n<tool_response>error: 你</tool_response>\n"
                "Assistant：<think>"),
        (True, "</think>It is 408.<|im_end|>"),
        (False, "\nUser：why\nAssistant："),
        (True, "because<|im_end|>"),
        (False, "\n"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("soft_tokens", [0, 2])
def test_a_prompt_and_what_follows_have_the_ids_of_the_dialogue(bpe, kind, thinking, soft_tokens):
    """Whatever is said, in any part; and after a call, `reply` leads from its end to the next answer."""
    template, special = ChatTemplate(bpe, kind, soft_tokens), bpe.special_ids
    for text in (*AWKWARD, FORGED, "".join(PART_TOKENS)):
        part = {"thinking": text} if thinking else {}
        messages = [message("user", text), message("assistant", text) | part | {"tool_calls": [text]},
                    message("tool", text), message("assistant", text) | part]  # fmt: skip
        content = bpe.encode(text)
        thought = [*content, special["</think>"]] if thinking else []
        call = [special["<tool_call>"], *content, special["</tool_call>"], special["<|im_end|>"]]
        ids = template.prompt(messages[:1], thinking) + thought + content + call
        ids += template.reply([text], thinking)
        assert ids == template.prompt(messages[:3], thinking)
        ids += thought + content + template.end_of_turn
        whole, targets = template.dialogue(messages)
        assert ids == whole
        learned = [one for one, target in zip(whole, targets) if target]
        assert learned == thought + content + call + thought + content + [special["<|im_end|>"]]
        written = [one for one in whole if one in special.values()]
        harmless = [{**one, "content": "x"} for one in messages]
        assert len(written) == len([one for one in template.dialogue(harmless)[0] if one in special.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_tokenizer_writes_what_it_wrote_and_refuses_the_rest(kind):
    old, new = (ChatTemplate(BpeTokenizer([], parts=parts), kind) for parts in ((), PART_TOKENS))
    plain = [message("system", "s"), *USED[-2:]]
    assert old.dialogue(plain) == new.dialogue(plain) and old.prompt(plain[:2]) == new.prompt(plain[:2])
    for messages in (USED[1:2], USED[2:3], [message("assistant", "") | {"tool_calls": [CALL]}]):
        with pytest.raises(UserError, match="the tokenizer of this model has no <"):
            old.dialogue(messages)
    with pytest.raises(UserError, match="has no <think>.*train a new one"):
        old.prompt(plain[:2], thinking=True)


def test_a_turn_with_calls_is_kept_or_dropped_as_a_whole(bpe):
    template = ChatTemplate(bpe)
    size = len(template.dialogue(USED)[0])
    assert fit_turns(template, USED, size) == USED and fit_turns(template, USED, size - 1) == USED[-2:]
    size = len(template.prompt(USED[:4]))
    assert fit_turns(template, USED[-2:] + USED[:4], size) == USED[:4]
    both = len(template.prompt(USED[-2:] + USED[:4]))  # with the marker of the answer
    assert [len(fit_turns(template, USED[-2:] + USED[:4], room)) for room in (both, both - 1)] == [6, 4]


@pytest.mark.parametrize("end, calls, room", [(4, 3, 520), (5, 1, 380)])
def test_a_long_turn_with_a_tool_is_cut(bpe, end, calls, room):
    """Question, answer and results give way; calls and markers stay, and the mask goes with the ids."""
    template, long = ChatTemplate(bpe), "word " * 200
    called = message("assistant", "") | {"tool_calls": [CALL] * calls}
    turn = [message("user", long), called, message("tool", long), message("tool", "408")]
    turn = [*turn, message("assistant", long)][:end]
    ids, targets = cut_turn(template, turn, room)
    assert len(ids) == len(targets) == room
    special, call = set(bpe.special_ids.values()), template.turn(called)[0]
    markers = [one for one in ids if one in special]
    whole = template.prompt(turn) if end == 4 else template.dialogue(turn)[0][:-2]  # without <|im_end|>
    assert markers == [one for one in whole if one in special]
    assert any(ids[place : place + len(call)] == call for place in range(room))
    answered = ids[::-1].index(template.before["assistant"][0]) if end == 5 else 0
    assert sum(targets) == sum(template.turn(called)[1]) + answered


# --- skills -----------------------------------------------------------------------------------------------


def test_thought_sums_think_in_half_of_the_answers():
    """With thinking, the working of the skill `arithmetic` is the thought; the answer is the bare value."""
    sums = [messages for messages in training_dialogues(["thought_sums"], 1500, 0)]
    answers = [one for messages in sums for one in messages[1::2]]
    assert all(one["content"].removeprefix("-").isdigit() for one in answers)
    thoughts = [one["thinking"] for one in answers if "thinking" in one]
    assert 0.45 < len(thoughts) / len(answers) < 0.55
    for one in answers:
        if one.get("thinking"):
            *_, tens = one["thinking"].split("=")
            assert abs(int(one["content"])) // 10 == int(tens)
    assert 0.02 < thoughts.count("") / len(thoughts) < 0.2  # sums of one-digit numbers


def test_tool_sums_call_the_calculator():
    """The calculator gives the result that the dialogue shows, and the answer is that result. Other answers
    come at once, and are as true."""
    found = [*training_dialogues(["tool_sums"], 2000, 0), *held_out_dialogues(["tool_sums"], 300, 0)]
    messages, turns = list(itertools.chain(*found)), []
    for one in messages:
        turns += [[]] * (one["role"] == "user")
        turns[-1] = [*turns[-1], one]
    signs, at_once = set(), [turn for turn in turns if len(turn) == 2]
    assert len(at_once) / len(turns) == pytest.approx(1 - tool_sums.CALLED, abs=0.04)  # five deviations
    for question, answer in at_once:
        expression = re.search(r"[(]*\d[\d +*/%()-]*", question["content"])[0].strip()
        assert calculate(expression) == answer["content"]
    for question, call, result, answer in (turn for turn in turns if len(turn) > 2):
        ((name, arguments),) = [one.values() for one in call["tool_calls"]]
        assert [one["role"] for one in (call, result, answer)] == ["assistant", "tool", "assistant"]
        assert name == "calculator" and arguments["expression"] in question["content"]
        assert calculate(arguments["expression"]) == result["content"] == answer["content"]
        signs |= set(arguments["expression"]) - set("0123456789 ")
    assert signs == set("+-*/%()")
    assert [item.messages[-1]["role"] for item in scored_items("tool_sums", 3, 0)] == ["user"] * 3
    assert tool_sums.LEAST >= 100  # smaller sums are those of `arithmetic`, on sides of their own


def test_a_plain_sample_is_a_plain_turn():
    assert as_turn(Sample("k", "q", "a")) == [message("user", "q"), message("assistant", "a")]
