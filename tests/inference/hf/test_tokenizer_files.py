"""Our tokenizers and templates as Hugging Face files: `transformers` alone reads the same ids and texts."""

import inspect
import json
import random
import string
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config.schema import TokenizerConfig
from inference.hf.tokenizer_files import tokenizer_files
from load_data.chat.chat_template import ChatTemplate
from load_data.tokenization.hf_tokenizer import HfTokenizer
from load_data.tokenization.tokenizer import PART_TOKENS, SPECIAL_TOKENS, UNKNOWN, BpeTokenizer
from load_data.tokenization.tokenizer import CharTokenizer, Tokenizer
from load_data.tokenization.train_tokenizer import learn_merges
from utils.errors import UserError

OLD = Path(__file__).resolve().parents[2] / "old_checkpoints/finished/TinySeek_SFT_final.pkl"
TEMPLATES = ("tinyseek", "chatml")
FRAGMENTS = {  # what mixed strings are made of, and how often
    "ascii": (string.printable, 6),
    "chinese": ("".join(map(chr, range(0x4E00, 0x4F00))) + "，。？！：你好", 3),
    "marks": ("".join(map(chr, [*range(0x300, 0x340), 0x20D0, 0xFE0F])) + "aeno", 2),
    "letters": ("".join(map(chr, [*range(0xA0, 0x250), *range(0x370, 0x6FF)])), 1),
    "emoji": ("🙂👩👨👧💻🇩🇪👍🏽❤☃", 1),
    "joined": (["👩‍👩‍👧", "👨🏽‍💻", "❤️‍🔥", "🏴‍☠️"], 1),
    "digits": ("0123456789٣½²一", 2),
    "space": ([" ", "  ", "\t", "\n", "\r\n", "\r", "\n\n    ", "\x0b", "\u3000", "\u2028", "\xa0"], 4),
    "special": ([*SPECIAL_TOKENS, *PART_TOKENS, UNKNOWN, "<|im_", "end|>", "User:"], 2),
    "code": (inspect.getsource(inspect).splitlines(keepends=True), 3),
    "any": ([chr(one) for one in range(0x20000) if not 0xD800 <= one < 0xE000], 1),
}


def mixed_strings(count, seed=0):
    """Random strings of all kinds of fragments; the first are empty and white space alone."""
    rng = random.Random(seed)
    kinds, weights = zip(*[(letters, weight) for letters, weight in FRAGMENTS.values()])
    texts = ["", *FRAGMENTS["space"][0]]
    while len(texts) < count:
        chosen = rng.choices(kinds, weights, k=rng.randrange(1, 8))
        parts = ["".join(rng.choices(kind, k=rng.randrange(1, 5))) for kind in chosen]
        edge = rng.choices(FRAGMENTS["space"][0], k=2)
        texts.append(edge[0] * rng.randrange(2) + "".join(parts) + edge[1] * rng.randrange(2))
    return texts


TEXTS = mixed_strings(1000)


@pytest.fixture(scope="module")
def trained():
    """A tokenizer that has learned merges of all kinds of fragments."""
    return learn_merges(TokenizerConfig(vocab_size=900), [*mixed_strings(400, 1), inspect.getsource(random)])


@pytest.fixture(scope="module")
def ours(trained):
    """Tokenizers by name: `old` is one of a checkpoint from before part tokens and the present pattern."""
    old = torch.load(OLD, weights_only=True)["tokenizer"]
    few = "".join(sorted(set("\n" + string.printable + "你好é🙂👩\u0301")))
    return {
        "bpe": trained,
        "old": Tokenizer.from_json(old if isinstance(old, str) else json.dumps(old)),
        "char": CharTokenizer(few),
        # Without a line break, with the character that first stands in for unknown ones, and U+FFFD.
        "odd char": CharTokenizer("".join(sorted("-]^\\[&ab\0\x7f\x80\u07ff\u0800\ue000\ufffd\U0010ffff"))),
        "old char": CharTokenizer(few, parts=()),
    }


NAMES = ("bpe", "old", "char", "odd char", "old char")


def load(folder, files, model_type=None):
    """What `transformers` reads from a folder with these files."""
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """A function: the tokenizer of this name with this template, as `transformers` reads it."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}

    def get(name, kind="tinyseek"):
        if (name, kind) not in found:
            files = tokenizer_files(ours[name], kind, 512)
            assert list(files) == ["tokenizer.json", "tokenizer_config.json"]
            found[name, kind] = load(folder / f"{name}_{kind}", files)
        return found[name, kind]

    return get


def encoded(tokenizer, texts):
    """The ids of `transformers` for text of users, in which special tokens are ordinary characters."""
    return tokenizer(texts, split_special_tokens=True)["input_ids"]


def test_the_strings_are_mixed(trained):
    """Each kind of fragment is in many of them, and so are most tokens."""
    joined = ["👩‍👩‍👧", "<|im_end|>", "Assistant：", "\r\n", "\t", "\u0301", "self.", "你", "7"]
    assert all(sum(one in text for text in TEXTS) >= 3 for one in joined)
    assert sum(text != text.lstrip() for text in TEXTS) > 300 < sum(text != text.rstrip() for text in TEXTS)
    assert len({one for ids in trained.encode_batch(TEXTS) for one in ids}) > 0.8 * trained.vocab_size


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_strings_have_the_same_ids_and_texts(name, ours, theirs):
    tokenizer, twin = ours[name], theirs(name)
    assert len(twin) == tokenizer.vocab_size and twin.model_max_length == 512
    assert (twin.eos_token_id, twin.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    expected = tokenizer.encode_batch(TEXTS)
    assert encoded(twin, TEXTS) == expected
    assert twin.batch_decode(expected) == [tokenizer.decode(ids) for ids in expected]
    rng = random.Random(2)
    rows = [[rng.randrange(tokenizer.vocab_size) for _ in range(30)] for _ in range(100)]
    for skip in (False, True):  # any ids: parts of characters, special tokens
        found = twin.batch_decode(rows, skip_special_tokens=skip)
        texts = [tokenizer.decode(ids, skip_special=skip) for ids in rows]
        assert found == [text.replace(UNKNOWN, "\ufffd") for text in texts]  # which ours spells, if asked to
    specials = {one: twin.convert_tokens_to_ids(one) for one in tokenizer.special_ids}
    assert specials == tokenizer.special_ids


@pytest.mark.parametrize("name", ("bpe", "odd char"))
def test_nothing_is_lost_when_transformers_writes_it_again(name, ours, theirs, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    again = load(tmp_path, {})
    assert encoded(again, TEXTS) == ours[name].encode_batch(TEXTS)
    assert again.chat_template == theirs(name).chat_template


def test_what_older_versions_of_transformers_would_assume(ours):
    """Before version 5, decoding tidies up spaces, and encoding gives types that models refuse."""
    config = json.loads(tokenizer_files(ours["bpe"], "tinyseek")["tokenizer_config.json"])
    assert config["clean_up_tokenization_spaces"] is False
    assert config["model_input_names"] == ["input_ids", "attention_mask"] and "model_max_length" not in config


@pytest.mark.parametrize("model_type", ("qwen3", "dots1", "deepseek_v3"))
def test_the_tokenizer_is_ours_whatever_the_model(model_type, ours, theirs, tmp_path):
    """`transformers` has tokenizer classes of its own for some models; none of them takes its place."""
    twin = load(tmp_path, tokenizer_files(ours["bpe"], "chatml"), model_type)
    assert encoded(twin, TEXTS[:100]) == ours["bpe"].encode_batch(TEXTS[:100])


def test_a_last_line_break_is_a_token_of_its_own(ours):
    """Contents encoded with the line break after them have the ids of both encoded separately."""
    bpe, line_break = ours["bpe"], ours["bpe"].encode("\n")
    texts = [text for text in TEXTS if not text.endswith("\n")]
    apart = [ids + line_break for ids in bpe.encode_batch(texts)]
    assert len(texts) > 800 and bpe.encode_batch([text + "\n" for text in texts]) == apart
    old = BpeTokenizer(bpe.merges, ours["old"].contents["pattern"])
    together = old.encode_batch([text + "\n" for text in texts])
    assert sum(ids != [*start, *line_break] for ids, start in zip(together, old.encode_batch(texts))) > 30
    # Nothing else has changed, and nothing at all for a text that goes on: the ids are those before an x.
    assert bpe.encode_batch(texts) == old.encode_batch(texts)
    for tokenizer in (bpe, old):
        longer = tokenizer.encode_batch([text + "\nx" for text in TEXTS])
        opened = tokenizer.encode_open([text + "\n" for text in TEXTS])
        assert opened == [ids[:-1] for ids in longer] == old.encode_batch([text + "\n" for text in TEXTS])
    assert bpe.encode_open(texts) == bpe.encode_batch(texts)


CALL = {"name": "calculator", "arguments": {"expression": "12 * 34 < 5 & \"é\" '你好'"}}


def dialogues(texts):
    """Dialogues of all kinds with these contents, the answers with thinking and calls among them."""
    for start in range(0, len(texts) - 12, 12):
        c = texts[start : start + 12]
        talk = [
            {"role": "user", "content": c[0]},
            {"role": "assistant", "content": c[1]},
            {"role": "user", "content": c[2]},
            {"role": "assistant", "content": c[3], "thinking": c[4]},
            {"role": "user", "content": c[5]},
            {"role": "assistant", "content": "", "thinking": "", "tool_calls": [CALL, '{"as": written']},
            {"role": "tool", "content": c[6]},
            {"role": "tool", "content": c[7]},
            {"role": "assistant", "content": c[8], "tool_calls": [CALL]},
            {"role": "tool", "content": c[9]},
            {"role": "assistant", "content": c[10]},
        ]
        yield talk if start % 24 else [{"role": "system", "content": c[11]}, *talk]


def plain(message):
    """Whether a tokenizer without part tokens has a form for `message`."""
    return message["role"] != "tool" and not message.keys() & {"thinking", "tool_calls"}


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("name", ("bpe", "old", "char", "old char"))
def test_the_template_writes_the_same_text(name, kind, ours, theirs):
    tokenizer, twin, template = ours[name], theirs(name, kind), ChatTemplate(ours[name], kind)
    known = [text for text in TEXTS if tokenizer.decode(tokenizer.encode(text)) == text]
    for talk in dialogues(known[:200]):
        talk = [one for one in talk if "parts" in tokenizer.contents or plain(one)]
        expected = tokenizer.decode(template.dialogue(talk)[0], skip_special=False)
        assert twin.apply_chat_template(talk, tokenize=False) == expected
        prompts = [talk[:end] for end, one in enumerate(talk, 1) if one["role"] in ("user", "tool")]
        for prompt in prompts:
            for thinking in (False, True)[: 1 + ("parts" in tokenizer.contents)]:
                ids = template.prompt(prompt, thinking)
                options = {"add_generation_prompt": True, "enable_thinking": thinking, "tokenize": False}
                found = twin.apply_chat_template(prompt, **options)
                assert found == tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("name", ("bpe", "char", "odd char"))
def test_the_template_gives_the_same_ids(name, kind, ours, theirs):
    """For contents as the docstring says: without special tokens, and with no white space at one end."""
    tokenizer, twin, template = ours[name], theirs(name, kind), ChatTemplate(ours[name], kind)
    texts = [one for one in TEXTS if not any(special in one for special in tokenizer.special_ids)]
    texts = [one for one in texts if (one == one.lstrip() if kind == "chatml" else not one.endswith("\n"))]
    count = 0
    for talk in dialogues(texts):
        assert twin.apply_chat_template(talk)["input_ids"] == template.dialogue(talk)[0]
        prompt = twin.apply_chat_template(talk[:-1], add_generation_prompt=True, enable_thinking=True)
        assert prompt["input_ids"] == template.prompt(talk[:-1], thinking=True)
        count += 1
    assert count > 15


def test_messages_may_have_the_form_of_hugging_face(ours, theirs):
    """Nested calls, `reasoning_content`, None for no content; keys that say nothing here. Newer versions of
    `transformers` rewrite some of it before they render; Jinja alone does not."""
    environment = ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    call = {"type": "function", "id": "1", "function": CALL}
    talk = [
        {"role": "user", "content": "12 * 34?"},
        {"role": "assistant", "content": None, "reasoning_content": "a product", "tool_calls": [call]},
        {"role": "tool", "content": "408", "tool_call_id": "1", "name": "calculator"},
        {"role": "assistant", "content": "408", "tool_calls": None, "reasoning_content": None},
    ]
    same = [
        talk[0],
        {"role": "assistant", "content": "", "thinking": "a product", "tool_calls": [CALL]},
        talk[2],
        {"role": "assistant", "content": "408"},
    ]
    for kind in TEMPLATES:
        expected = ours["bpe"].decode(ChatTemplate(ours["bpe"], kind).dialogue(same)[0], skip_special=False)
        twin = theirs("bpe", kind)
        for messages in (talk, same):
            assert twin.apply_chat_template(messages, tokenize=False) == expected
            assert environment.from_string(twin.chat_template).render(messages=messages) == expected


@pytest.mark.parametrize("name", ("old", "old char"))
def test_a_tokenizer_without_part_tokens_says_so(name, theirs):
    """Otherwise `<think>` would be read letter by letter."""
    ask = {"role": "user", "content": "hi"}
    answers = [{"thinking": ""}, {"reasoning_content": "a"}, {"tool_calls": [CALL]}]
    cases = [([ask, {"role": "assistant", "content": "", **more}], {}) for more in answers]
    for messages, options in [*cases, ([ask], {"enable_thinking": True})]:
        with pytest.raises(Exception, match="can neither think nor use tools"):
            theirs(name).apply_chat_template(messages, tokenize=False, **options)


NAMES = ("<sep>", "<end>")


def imported(model, *added, **files) -> HfTokenizer:
    """An imported tokenizer. Its special token <sep> swallows the space before it. Two tabs are an added
    token, not a special one."""
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<end>", tokenizers.AddedToken("<sep>", lstrip=True)])
    backend.add_tokens(["\t\t"])
    return HfTokenizer({"tokenizer.json": backend.to_str(), **files}, added)


LETTERS = {letter: number for number, letter in enumerate(sorted(string.printable))}
INSIDE = ("<end>", "<sep>", "\t\t")
MODELS = {  # special tokens beyond the vocabulary; within, after an id that nothing has; a list as vocabulary
    "beyond": tokenizers.models.BPE(vocab=LETTERS, merges=[]),
    "gap": tokenizers.models.BPE(vocab=LETTERS | dict(zip(INSIDE, range(101, 104))), merges=[]),
    "list": tokenizers.models.Unigram([(letter, -1.0) for letter in [*LETTERS, "<unk>", "<end>"]], 100),
}
FILES = {
    "tokenizer_config.json": '{"eos_token": "<end>",  "chat_template": "{{ 1 }}"}',
    "chat_template.jinja": "{{ 2 }}",
}


def test_files_of_an_imported_tokenizer_are_what_they_were():
    tokenizer = imported(MODELS["gap"], **FILES)
    for kind in ("own", *TEMPLATES):  # it has the special tokens of neither
        assert tokenizer_files(tokenizer, kind) == tokenizer.contents["files"]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_special_tokens_added_to_an_imported_tokenizer_have_their_ids(model, tmp_path):
    """Its own template stays; ours replaces it where a model was trained with ours."""
    tokenizer = imported(model, "<|im_start|>", "<|im_end|>", **FILES)
    talk, kept = [{"role": "user", "content": "hi"}], tokenizer.to_json()
    special = [tokenizer.special_ids[name] for name in (*NAMES, "<|im_start|>", "<|im_end|>")]
    written = "\t\ta <sep>a<end>a<|im_start|>a<|im_end|>a"
    (letter,) = tokenizer.encode("a")
    tabs = tokenizers.Tokenizer.from_str(tokenizer.contents["files"]["tokenizer.json"]).token_to_id("\t\t")
    rendered = {"own": "2", "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}
    for kind, text in rendered.items():
        twin = load(tmp_path / kind, tokenizer_files(tokenizer, kind))
        ids = twin(written)["input_ids"]
        assert ids[::2] == [tabs, *special] and set(ids[1::2]) == {letter}
        assert twin.decode([letter, *special], skip_special_tokens=True) == "a"
        assert twin.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) == text
        assert twin.eos_token == "<end>"
    assert tokenizer.to_json() == kept


def test_an_id_that_the_format_cannot_express_is_refused():
    """The vocabulary of a Unigram is a list, so it has no gaps."""
    tokenizer = imported(MODELS["list"], "<|im_start|>", "<|im_end|>", **FILES)
    tokenizer.special_ids["<|im_end|>"] += 1
    with pytest.raises(UserError, match="no place for the special token <.im_end.> with the id 106"):
        tokenizer_files(tokenizer, "own")
