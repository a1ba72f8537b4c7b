"""A tokenizer as Hugging Face files, which `AutoTokenizer.from_pretrained` reads with no code of ours.

    tokenizer.json          the vocabulary, with the same ids, and the rules of encoding and decoding
    tokenizer_config.json   names of special tokens, and the chat template (Jinja)

`tokenizer(text, split_special_tokens=True)` gives the ids of `Tokenizer.encode`, and `apply_chat_template`
the text of `ChatTemplate`; `enable_thinking=True` asks for thinking, as in Qwen3. The template is a key of
the configuration, not a file `chat_template.jinja`, because every version of `transformers` reads the key.

The ids of `apply_chat_template` are those of `ChatTemplate` as well, but contents are not encoded separately
there, so there are three exceptions:

- Anyone who writes a message can forge a turn: `<|im_end|>` in a content becomes the special token.
- `tinyseek`: a content that ends in a line break may merge with the line break after it. With a tokenizer
  from before `SPLIT_PATTERN` set the last line break apart, so may one that ends in a sign.
- `chatml`: a content that begins with white space may merge with the line break before it.

And a text to continue that ends in a sign and a line break is one token longer there: see `encode_open`.
"""

import json

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from load_data.chat.chat_template import RESULT, ChatTemplate
from load_data.tokenization.tokenizer import END_OF_TEXT, MASK, PAD, PART_TOKENS, UNKNOWN, BpeTokenizer
from load_data.tokenization.tokenizer import CharTokenizer, Tokenizer
from utils.errors import UserError

CONFIG = "tokenizer_config.json"
OPENING = {"tinyseek": "User：", "chatml": "<|im_start|>"}  # the special token that begins a question
# MARKS: the texts before and after a content, by role. A call is {"name", "arguments"}, by itself or as the
# value of "function", or the text of that.
CHAT_TEMPLATE = """\
{%- set marks = MARKS %}
{%- for message in messages %}
    {%- set thinking = message.thinking if message.thinking is string else message.reasoning_content %}
    {%- if "tool" not in marks and (thinking is string or message.tool_calls or enable_thinking) %}
        {{- raise_exception("this model can neither think nor use tools") }}
    {%- endif %}
    {{- marks[message.role][0] }}
    {%- if thinking is string %}
        {{- "<think>" + thinking + "</think>" }}
    {%- endif %}
    {{- message.content or "" }}
    {%- for one in message.tool_calls or [] %}
        {%- set call = one.function or one %}
        {{- "<tool_call>" + (call if call is string else call | tojson) + "</tool_call>" }}
    {%- endfor %}
    {{- marks[message.role][1] }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- marks.assistant[0] + ("<think>" if enable_thinking else "") }}
{%- endif %}"""
# Characters by the length of their UTF-8 form. Three bytes come first: see `characters`.
BY_LENGTH = {3: r"\x{800}-\x{d7ff}\x{e000}-\x{ffff}", 1: r"\x{0}-\x{7f}", 2: r"\x{80}-\x{7ff}"}
BY_LENGTH[4] = r"\x{10000}-\x{10ffff}"


def tokenizer_files(
    tokenizer: Tokenizer, template_kind: str | None, max_length: int | None = None
) -> dict[str, str]:
    """Return the text of each file. `template_kind`: as for `ChatTemplate`; None for a model that continues
    texts, which begin with `<|endoftext|>`. `max_length`: the longest text, in tokens, that the model was
    trained on, if known.

    The files of an imported tokenizer are what they were, with the special tokens added since. Its chat
    template remains unless `template_kind` is one of ours and the tokenizer has the special tokens for it.
    """
    if tokenizer.kind == "hf":
        files, added = dict(tokenizer.contents["files"]), tokenizer.contents["added"]
        if added:
            ids = {name: tokenizer.special_ids[name] for name in (*tokenizer.names, *added)}
            files["tokenizer.json"] = with_special(files["tokenizer.json"], ids)
    else:
        backend = byte_level(tokenizer) if tokenizer.kind == "bpe" else characters(tokenizer)
        if template_kind is None:
            end = (END_OF_TEXT, tokenizer.eos_id)
            backend.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[end])
        # No text may become <unk> by looking like it.
        ids = {name: one for name, one in tokenizer.special_ids.items() if name != UNKNOWN}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        } | ({"model_max_length": max_length} if max_length else {})
        config |= {"mask_token": MASK} if MASK in ids else {}
        files = {"tokenizer.json": with_special(backend.to_str(), ids), CONFIG: as_json(config)}
    if OPENING.get(template_kind) in tokenizer.special_ids:
        files.pop("chat_template.jinja", None)  # it would take precedence
        config = json.loads(files.get(CONFIG, "{}"))
        files[CONFIG] = as_json(config | {"chat_template": chat_template(tokenizer, template_kind)})
    return files


def chat_template(tokenizer: Tokenizer, kind: str) -> str:
    """Return the Jinja template that writes the text of a `ChatTemplate` of this kind."""
    # A tokenizer of bytes spells all markers, also where kind char has no line break.
    spell = BpeTokenizer([], parts=PART_TOKENS if RESULT in tokenizer.special_ids else ())
    ours, marks = ChatTemplate(spell, kind), {}
    for role, before in ours.before.items():
        marks[role] = [spell.decode(ids, skip_special=False) for ids in (before, ours.after[role])]
    return CHAT_TEMPLATE.replace("MARKS", json.dumps(marks, ensure_ascii=False))


def byte_level(tokenizer: BpeTokenizer) -> tokenizers.Tokenizer:
    """Return the backend of a tokenizer of kind bpe, which can also decode."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.decoder = decoders.ByteLevel()
    return backend


def characters(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    """Return a backend that encodes and decodes like a tokenizer of kind char.

    The library gives one `<unk>` to an unknown character, ours one to each of its UTF-8 bytes. So a
    normalizer puts as many stand-ins in its place. A stand-in is an unknown character of three bytes itself,
    so those of three bytes are replaced first, before there are any others.
    """
    known, unknown = tokenizer.contents["characters"], tokenizer.special_ids[UNKNOWN]
    stand_in = next(one for one in map(chr, range(0xE000, 0x10000)) if one not in known)
    escaped = "".join(rf"\x{{{ord(one):x}}}" for one in known)
    ids = {one: number for one, (number,) in tokenizer.ids_of.items()}
    backend = tokenizers.Tokenizer(models.WordLevel(ids | {UNKNOWN: unknown}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{ranges}&&[^{escaped}]]"), stand_in * length)
            for length, ranges in BY_LENGTH.items()
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(UNKNOWN, "\ufffd"), decoders.Fuse()])
    return backend


def with_special(text: str, ids: dict[str, int]) -> str:
    """Return tokenizer.json with the special tokens of `ids`, some of which it may have already.

    Trap: the library does not read the ids of added tokens. It takes those of the vocabulary, or counts on
    from its size. So the vocabulary gets all of them, unless it is a list (Unigram).
    """
    data, before = json.loads(text), tokenizers.Tokenizer.from_str(text)
    missing = sorted((one, name) for name, one in ids.items() if before.token_to_id(name) != one)
    if isinstance(data["model"]["vocab"], dict):
        present = {token.content: one for one, token in before.get_added_tokens_decoder().items()}
        data["model"]["vocab"] |= present | ids
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": one, "content": name, **flags} for one, name in missing]
    data["added_tokens"] = [*(data.get("added_tokens") or ()), *added]
    text = as_json(data)
    after = tokenizers.Tokenizer.from_str(text)
    for name, one in ids.items():
        if after.token_to_id(name) != one:
            raise UserError(f"tokenizer.json has no place for the special token {name} with the id {one}")
    return text


def as_json(data: dict) -> str:
    """Return the text of a JSON file."""
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"
