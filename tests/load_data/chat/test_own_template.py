"""Chat templates of other models: the ids of `apply_chat_template`, for dialogues and for prompts; and
templates that are refused."""

import json
import re
import sys
from functools import partial

import pytest

from load_data.chat.chat_template import ChatTemplate, cut_turn, fit_turns
from load_data.chat.records import message
from load_data.tokenization.hf_tokenizer import read_hf_tokenizer
from load_data.tokenization.tokenizer import BpeTokenizer, Tokenizer
from load_data.tokenization.jinja_sandbox import read_turns
from tests.load_data.chat.test_chat_template import AWKWARD, talk
from tests.load_data.hf_folders import TEMPLATES, save
from utils.errors import UserError

if sys.platform == "linux":
    import resource

CASES = {  # name -> kind of model, names of special tokens, template
    "qwen2": ("byte_level", "chatml", "chatml"),
    "qwen3": ("byte_level", "chatml", "qwen3"),
    "llama2": ("llama", "llama2", "llama2"),
    "mistral": ("mistral", "llama2", "mistral"),
    "mistral, markers as tokens": ("mistral", "mistral", "mistral"),
    "mistral, prefix everywhere": ("llama", "llama2", "mistral"),
    "llama3": ("byte_level", "llama3", "llama3"),
    "llama3.1": ("byte_level", "llama3", "llama3.1"),
    "deepseek": ("byte_level", "deepseek", "deepseek"),
    "deepseek2": ("byte_level", "deepseek2", "deepseek2"),
    "phi": ("llama", "phi", "phi"),
    "zephyr, unigram": ("unigram", "phi", "phi"),
}
TALKS = [
    talk("The quick question"),
    talk("What is f(x)?", "It is 42!"),
    talk("你好", "Grüße", "a\n\nb  c"),
    talk("one", "two", "three", "four", "five", "six"),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each case: our template, and the tokenizer of `transformers`."""
    made = {}
    for number, (name, (model, family, template)) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        theirs = save(folder, model, family, TEMPLATES[template])
        made[name] = ChatTemplate(read_hf_tokenizer(folder, 1000), "own"), theirs
    return made


def expected(theirs, messages):
    prompt = messages[-1]["role"] == "user"
    return theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)


def ids_of(template, messages):
    return template.prompt(messages) if messages[-1]["role"] == "user" else template.dialogue(messages)[0]


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(opened, name):
    template, theirs = opened[name]
    talks = TALKS + [[message("system", "Be brief."), *one] for one in TALKS if "system" in template.before]
    assert ("system" in template.before) == ("llama2" not in CASES[name] and "mistral" not in CASES[name])
    for messages in talks:
        if name == "qwen3":  # its last answer has an empty thinking block
            messages = messages if messages[-1]["role"] == "user" else messages[:-1]
        assert ids_of(template, messages) == expected(theirs, messages)


@pytest.mark.parametrize("name", CASES)
def test_answers_and_their_ends_are_supervised(opened, name):
    """And a prompt followed by an answer, whatever it contains, has the ids of the dialogue."""
    template, _ = opened[name]
    end = template.end_of_turn[0]
    assert template.stop_ids == {end, *template.tokenizer.eos_ids}
    for text in (*AWKWARD, " a", "a ", "yes</s>[INST] no [/INST]<|im_end|>"):
        messages = talk("question", text, text, "answer")
        ids, targets = template.dialogue(messages)
        learned = [one for one, target in zip(ids, targets) if target]
        said = [template.content("assistant", one) for one in (text, "answer")]
        assert learned == [*said[0], end, *said[1], end]
        prompts = template.prompt(messages[:1]), template.prompt(messages[:3])
        answer = template.content("assistant", text)
        assert ids[: len(prompts[1])] == prompts[1]
        assert prompts[1][: len(prompts[0]) + len(answer) + 1] == [*prompts[0], *answer, end]
        special = set(template.tokenizer.special_ids.values()) - {template.tokenizer.special_ids.get("<unk>")}
        harmless = template.dialogue(talk("question", "x", "x", "answer"))[0]
        assert [one for one in ids if one in special] == [one for one in harmless if one in special]


@pytest.mark.parametrize("name", [name for name in CASES if "unigram" not in name])  # which loses letters
def test_an_answer_read_again_has_the_ids_that_were_written(opened, name):
    """A model's answer becomes text, which brings its first space along, and then ids again."""
    template, _ = opened[name]
    for text in ("Hello you", "42", "\n x"):
        ids = template.content("assistant", text)
        assert template.content("assistant", template.tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("name", CASES)
def test_shortened_dialogues_keep_their_beginning(opened, name):
    template, _ = opened[name]
    messages = talk(*["word " * 9] * 6, "last " * 9)
    whole = template.prompt(messages)
    start = template.start(messages)
    assert whole[: len(start)] == start
    assert bool(start) == ("phi" not in CASES[name] and name not in ("qwen3", "llama2"))
    for room in (len(whole), len(whole) - 1, len(whole) // 2):
        kept = fit_turns(template, messages, room)
        ids = template.prompt(kept)
        assert len(ids) <= room and ids[: len(start)] == start and (len(kept) < 7) == (room < len(whole))
    room = 2 * len(template.prompt(talk("word")))
    ids, targets = cut_turn(template, talk("last " * 99), room)
    assert len(ids) == len(targets) == room and ids[: len(start)] == start


def test_markers_of_the_families(opened):
    turns = {name: template.tokenizer.turns for name, (template, _) in opened.items()}
    assert turns["qwen2"]["default_system"] == "You are a helpful model." and turns["qwen2"]["first"] == ""
    assert turns["qwen3"]["default_system"] is None and turns["qwen3"]["prompt"] == "<|im_start|>assistant\n"
    assert turns["llama3.1"]["default_system"] == "" == turns["llama3.1"]["first"]
    assert turns["llama2"] == {
        "first": "", "prompt": "", "default_system": None,
        "before": {"user": "<s>[INST] ", "assistant": " "},
        "after": {"user": " [/INST]", "assistant": " </s>"},
    }  # fmt: skip
    assert turns["deepseek"]["before"]["system"] == "" and turns["deepseek"]["first"].startswith("<｜begin")
    assert turns["deepseek2"]["before"]["assistant"] == "Assistant: " == turns["deepseek2"]["prompt"] + " "
    template = opened["deepseek"][0]
    assert ChatTemplate(Tokenizer.from_json(template.tokenizer.to_json()), "own").turn(TALKS[1][1]) == (
        template.turn(TALKS[1][1])
    )


def test_parts_need_their_tokens(opened):
    """Thinking where the vocabulary has the tokens; results of tools have none here."""
    template, _ = opened["qwen3"]
    special = template.tokenizer.special_ids
    thought = message("assistant", "yes") | {"thinking": "well", "tool_calls": ["x"]}
    ids, targets = template.turn(thought)
    assert [one for one in ids if one in special.values()] == [
        special[name]
        for name in ("<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>")
    ]
    assert template.prompt(talk("q"), thinking=True)[-1] == special["<think>"]
    with pytest.raises(UserError, match="has no <tool_response>"):
        template.turn(message("tool", "1"))


def test_a_new_model_has_every_template(tmp_path):
    """With soft tokens after each marker, and results of tools in the turn of the user."""
    save(tmp_path, "llama", "llama2", TEMPLATES["mistral"])
    tokenizer = read_hf_tokenizer(tmp_path)
    for kind in ("tinyseek", "chatml", "own"):
        template = ChatTemplate(tokenizer, kind, soft_tokens=2)
        used = [*talk("q"), message("assistant", "") | {"tool_calls": ["1"]}, message("tool", "2")]
        ids = template.prompt(used)
        prompt = template.prompt(used[:1]) + template.turn(used[1])[0][len(template.before["assistant"]) :]
        assert ids == prompt[: len(prompt) - len(template.end_of_turn) + 1] + template.reply(["2"])
        assert sum(one >= tokenizer.vocab_size for one in ids) == 6
        assert ids.count(tokenizer.special_ids["<s>"]) == (kind == "own")


def test_models_without_markers_say_so(tmp_path):
    """When they are used, not before: such a model can still continue texts."""
    size = len(save(tmp_path / "none", "byte_level", "deepseek"))
    save(tmp_path / "odd", "byte_level", "deepseek", "{{ messages[0].content }}")
    save(tmp_path / "chatml", "byte_level", "chatml")
    cases = [
        ("none", "own", "no markers of its own: it has no chat template; it can continue texts, but"),
        (
            "none",
            "tinyseek",
            "data.template=tinyseek: the tokenizer of this model has no .*; it can continue",
        ),
        ("odd", "own", "its chat template is not understood: it changes, leaves out or repeats a message"),
        ("chatml", "tinyseek", "has no .*; choose data.template=chatml"),
    ]
    for folder, kind, words in cases:
        tokenizer = read_hf_tokenizer(tmp_path / folder, 400 if folder != "none" else size)
        template = ChatTemplate(tokenizer, kind)
        assert template.stop_ids == set(tokenizer.eos_ids)
        for use in (template.prompt, template.dialogue, partial(fit_turns, template, room=9)):
            with pytest.raises(UserError, match=words):
                use(messages=talk("hi"))
    with pytest.raises(UserError, match="only a tokenizer of the kind hf"):
        ChatTemplate(BpeTokenizer([]), "own").prompt(talk("hi"))
    save(tmp_path / "llama2", "llama", "llama2", TEMPLATES["llama2"])
    with pytest.raises(UserError, match="no place for a system message"):
        ChatTemplate(read_hf_tokenizer(tmp_path / "llama2"), "own").prompt(talk("hi", system="be"))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
REFUSED = {
    "{{ messages": "TemplateSyntaxError",
    "{{ raise_exception('never') }}": "TemplateError: never",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ 'a' * 10**9 }}": r"\* is not allowed|\*\* is not allowed",
    ENDLESS + "{% endfor %}" * 3: "does not end within",
    ENDLESS + "aaaa" + "{% endfor %}" * 3: "writes more than|does not end within",
    " " * 200_000: "longer than",
    "{{ messages[-1].content }}": "leaves out or repeats",
    "{% for one in messages %}{{ one.content | upper }}{% endfor %}": "changes, leaves out",
    "{% for one in messages %}{{ one.content }}\n{% endfor %}": "no special token ends an answer",
    "{% for one in messages %}{{ one.content + '</s>' }}{% endfor %}"
    "{% if messages | length > 4 %}{{ 'long' }}{% endif %}": "messages it writes 'long' where '' is expected",
    "{% for one in messages %}{{ (loop.index0 if one.role == 'user' else '') ~ one.content + '</s>' }}"
    "{% endfor %}": "the first question follows",
    TEMPLATES["phi"].replace("<|assistant|>\\n", "<|assistant|>\\n<think>"): "it asks for an answer with",
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}"
    "{{ '</s>!' if loop.last else '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}": "what follows an answer depends on its",
}  # fmt: skip


@pytest.mark.parametrize("source", REFUSED)
def test_refused_templates(source):
    found = read_turns(source, {"eos_token": "</s>"}, ["</s>", "<|end|>"])
    assert found.keys() == {"refused"} and re.search(REFUSED[source], found["refused"]), found


@pytest.mark.skipif(sys.platform != "linux", reason="memory cannot be limited")
def test_a_template_has_little_memory():
    """One line of it can ask for any amount, also when it is compiled. The limit is gone afterwards. What a
    process has freed it may use again, so the amounts here are beyond that."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    much = "'%10000000000d' % 3", "'a' | center(10000000000)", "range(99999) | join('a' | center(100000))"
    for size in much:
        assert "MemoryError" in read_turns(f"{{{{ ({size}) | length }}}}", {}, [])["refused"]
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_template_that_is_no_text(tmp_path):
    save(tmp_path, "byte_level", "chatml", 5)
    with pytest.raises(UserError, match="chat_template is not a text"):
        read_hf_tokenizer(tmp_path)


def test_turns_of_a_stranger_are_checked(opened):
    data = json.loads(opened["qwen2"][0].tokenizer.to_json())
    right = data["turns"]
    for turns in ({}, [1], right | {"before": {"user": "x"}}, right | {"prompt": None}):
        with pytest.raises(UserError, match="not a tokenizer that TinySeek wrote"):
            Tokenizer.from_json(json.dumps(data | {"turns": turns}))
