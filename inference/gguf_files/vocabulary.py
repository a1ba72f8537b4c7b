"""The tokenizer in a GGUF file: byte-level BPE, which llama.cpp calls `gpt2`, and the chat template.

llama.cpp cuts text into pieces by patterns that it knows by name, and ours is not among them. `superbpe`,
which cuts at digits only, comes nearest. Measured with a vocabulary of 4096 tokens:

    held-out Python     98 % of tokens are ours, 1.33 bits per byte instead of 1.29 (`qwen2`: 87 %, 1.62)
    questions, answers  99.9 % of tokens are ours
    whole prompts       With the template tinyseek a sign at the end of a question merges with the line break
                        after it. On one skill right answers fell from 99 to 78 of 100. With chatml
                        <|im_end|> stands between them.

Programs that need our results pass ids to llama.cpp instead of text. A tokenizer from Hugging Face keeps its
own pattern, which must be one of `PATTERNS`; llama.cpp leaves out its Unicode normalization (NFC).
"""

import json

import tokenizers

from inference.hf.tokenizer_files import tokenizer_files
from load_data.tokenization.hf_tokenizer import chat_template
from load_data.tokenization.plain_text import parts
from load_data.tokenization.tokenizer import Tokenizer
from utils.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # plain text never becomes a control token
NEAREST = "superbpe"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {  # the patterns; True if a piece that is a token is not merged from smaller ones
    (LLAMA3.replace("{1,3}", ""), False): "qwen2",
    (LLAMA3, False): "dbrx",
    (LLAMA3, True): "llama-bpe",
    ("GPT-2", False): "gpt-2",
}


def vocabulary_of(tokenizer: Tokenizer, template_kind: str, rows: int) -> dict:
    """Return the metadata of the tokenizer of a model with `rows` ids.

    Raise `UserError` for a tokenizer that llama.cpp has no equal of.
    """
    if tokenizer.kind == "char":
        raise UserError("tokenizer.kind=char: llama.cpp has no such tokenizer; train with tokenizer.kind=bpe")
    files = tokenizer_files(tokenizer, template_kind)
    data, backend = (read(files["tokenizer.json"]) for read in (json.loads, tokenizers.Tokenizer.from_str))
    pattern = NEAREST if tokenizer.kind == "bpe" else pattern_of(data)
    kinds, tokens = [UNUSED] * rows, [f"[PAD{number}]" for number in range(rows)]
    for text, number in backend.get_vocab(with_added_tokens=False).items():
        tokens[number], kinds[number] = text, NORMAL
    for number, token in backend.get_added_tokens_decoder().items():
        tokens[number], kinds[number] = token.content, CONTROL if token.special else USER_DEFINED
    merges = [one if isinstance(one, str) else " ".join(one) for one in data["model"]["merges"]]
    if not merges:
        raise UserError("the tokenizer of this model has no merges, and llama.cpp needs one")
    keys = {
        "model": "gpt2",
        "pre": pattern,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": (tokenizer.begin or [tokenizer.eos_id])[0],
        "add_bos_token": tokenizer.kind == "hf" and tokenizer.begin != [],
        "eos_token_id": tokenizer.eos_id,
        "padding_token_id": tokenizer.pad_id,
    }
    if "<|im_end|>" in tokenizer.special_ids:
        keys["eot_token_id"] = tokenizer.special_ids["<|im_end|>"]
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return keys | {"tokenizer.chat_template": chat_template(files)}


def pattern_of(data: dict) -> str:
    """Return llama.cpp's name of the pattern in a tokenizer.json."""
    steps = parts(data.get("pre_tokenizer"))
    found = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    found += ["GPT-2" for step in steps[-1:] if step.get("use_regex") and not step["add_prefix_space"]]
    kinds = [data["model"]["type"], *(step["type"] for step in steps[-1:])]
    normalizers = {step["type"] for step in parts(data.get("normalizer"))}
    name = PATTERNS.get((*found, bool(data["model"].get("ignore_merges"))))
    if kinds != ["BPE", "ByteLevel"] or normalizers - {"NFC"} or name is None:
        raise UserError(
            "the tokenizer of this model is not one of those that llama.cpp cuts text for in the same way: "
            "byte-level BPE with the pattern of GPT-2, Llama 3 or Qwen2"
        )
    return name
