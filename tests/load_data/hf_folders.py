"""Small tokenizers of every model in the `tokenizers` format, trained here and saved by `transformers`; and
chat templates in the style of the families."""

import json
from functools import cache

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = 3 * [
    "The quick brown fox said: \"I'm 42 years old!\" [INST] user assistant system\n    def f(x): return x",
    "<s> is a sign of HTML, </s> too. 你好，世界。Grüße!", "User: question Assistant: answer", "think tool",
]  # fmt: skip
SPECIALS = {  # names as `transformers` has them, then more added tokens
    "chatml": ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ["<|im_start|>"]),
    "llama2": ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, []),
    "llama3": ({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
               ["<|start_header_id|>", "<|end_header_id|>"]),
    "deepseek": ({"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
                 ["<｜User｜>", "<｜Assistant｜>"]),
    "phi": ({"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
            ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
}  # fmt: skip
SPECIALS["deepseek2"] = SPECIALS["deepseek"]
SPECIALS["mistral"] = (SPECIALS["llama2"][0], ["[INST]", "[/INST]"])
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added, but with "special": false

TEMPLATES = {
    "chatml": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful model.<|im_end|>\\n' }}
{%- endif %}
{%- for one in messages %}
    {%- if one.role != "system" or not loop.first %}
        {{- '<|im_start|>' + one.role + '\\n' + one.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(last=0) %}
{%- for one in messages %}
    {%- if one.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for one in messages %}
    {%- if one.role == 'assistant' and loop.index0 > ns.last and loop.last %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + one.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + one.role + '\\n' + one.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "llama2": """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    "llama3": "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "llama3.1": "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' }}"
    "{{ strftime_now('%Y') + '\\n\\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for one in messages %}{% if one.role != 'system' %}{{ '<|start_header_id|>' + one.role + "
    "'<|end_header_id|>\\n\\n' + one.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "deepseek": "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<｜Assistant｜>' + message.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
    "deepseek2": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'Assistant:' }}{% endif %}",
    "phi": "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '' }}{% endif %}",
}


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Qwen and Llama-3 have it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def sentence_bpe(legacy: bool) -> tokenizers.Tokenizer:
    """As Llama-2 has it (`legacy`) or Mistral: spaces as U+2581, bytes for unknown characters, special tokens
    and merges that lead to them in the vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=180, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    data = json.loads(backend.to_str())
    vocab = data["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ("<s", "</", "</s"):
        vocab.setdefault(piece, len(vocab))
    merges = [["<", "s"], ["<", "/"], ["<s", ">"], ["</", "s"], ["</s", ">"]]
    data["model"]["merges"] = [*merges, *data["model"]["merges"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    spaces = normalizers.Replace(" ", "▁")
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        backend.pre_tokenizer = None
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> tokenizers.Tokenizer:
    """As T5 and many Japanese models have it; <s> and </s> are likely pieces of the vocabulary."""
    letters = sorted({letter for text in TEXT for letter in text if letter > " "} | {"▁"})
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((letter, -6.0) for letter in letters)]
    pieces += [("▁the", -3.0), ("▁a", -3.0), ("is", -3.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_piece() -> tokenizers.Tokenizer:
    """As BERT has it, but words are cut at white space only, so that a marker can be a word."""
    words = {word for text in TEXT for word in text.split()}
    letters = sorted({letter for word in words for letter in word})
    names = ["<unk>", "<s>", "</s>", "the", "is", "##s", *letters, *(f"##{letter}" for letter in letters)]
    vocab = {word: one for one, word in enumerate(dict.fromkeys(names))}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.WhitespaceSplit(),
        decoders.WordPiece(cleanup=False),
    )
    return backend


def word_level() -> tokenizers.Tokenizer:
    """Whole words; ids are missing between the last two."""
    words = ["<unk>", "<s>", "</s>", *sorted({word for text in TEXT for word in text.split()})]
    vocab = {word: one for one, word in enumerate(dict.fromkeys(words))}
    vocab[words[-1]] += 20
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


MODELS = {
    "byte_level": byte_level, "llama": lambda: sentence_bpe(True), "mistral": lambda: sentence_bpe(False),
    "unigram": unigram, "word_piece": word_piece, "word_level": word_level,
}  # fmt: skip


@cache
def trained(model: str) -> str:
    """The JSON of a tokenizer without special tokens of a family."""
    return MODELS[model]().to_str()


def save(folder, model: str, family: str = "llama2", template: str | None = None, more=()):
    """Write a tokenizer with the special tokens of a family, and perhaps a chat template; return what
    `transformers` makes of it."""
    from transformers import PreTrainedTokenizerFast

    named, others = SPECIALS[family]
    backend = tokenizers.Tokenizer.from_str(trained(model))
    others = [AddedToken(name, normalized=False, special=True, rstrip=family == "phi") for name in others]
    backend.add_special_tokens([*(AddedToken(name, normalized=False) for name in named.values()), *others])
    backend.add_tokens([AddedToken(name, normalized=True) for name in NOT_SPECIAL] + list(more))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)
    theirs.save_pretrained(folder)
    return theirs
