"""Any tokenizer of the `tokenizers` library (Hugging Face's tokenizer.json) as a tokenizer of ours.

    contents    files: the text of tokenizer.json and of the small files beside it, verbatim
                added: special tokens of ours, whose ids follow its own
                turns: the markers of its chat template (turns.py), or why there are none

Special tokens exist only as ids, as in the other kinds: all added tokens count, those with "special": false
too (Qwen's <think> and <tool_call>), and all that tokenizer_config.json names. An added token of one
character or of white space alone that is not special is text (GPT-NeoX's runs of spaces, DeepSeek-V2's
letters). So `encode` gives the ids of `transformers` with split_special_tokens=True, except that there
- a text can still reach added tokens that are not special, and special ones that the vocabulary lists;
- `decode` drops the space before the first word of a text, which here is a part of its token.
"""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import tokenizers

from load_data.tokenization.base import END_OF_TEXT, MASK, PAD, PART_TOKENS, SPECIAL_TOKENS
from load_data.tokenization.base import Tokenizer, encoded
from load_data.tokenization.plain_text import parts, speller, without_prefix, without_specials
from load_data.tokenization.turns import check_turns
from utils.errors import UserError

TOKENIZER = "tokenizer.json"
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # the second decides
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
FILES = (TOKENIZER, *SETTINGS, TEMPLATE, GENERATION)
OTHERS = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")  # from which it can be made
NO_END = "the tokenizer has no end of text: name an eos_token in tokenizer_config.json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
UNHEARD = "\u2603 \U0001f9ff"  # characters that many tokenizers do not know
LARGEST = 64 * 2**20  # bytes of a file
MOST_IDS = 2**22


class HfTokenizer(Tokenizer):
    """A tokenizer.json with its special tokens, see above."""

    kind, parts_key = "hf", "added"

    def __init__(self, files: dict[str, str], added: Sequence[str] = (), turns: dict | None = None):
        """`files`: texts by name, of `FILES`; `turns`: what `read_turns` returned, or {"refused": why}.
        Raises all kinds of exceptions, and panics, for files that are no tokenizer."""
        self.contents = {"files": files, "added": [], "turns": check_turns(turns)}
        data, whole = json.loads(files[TOKENIZER]), tokenizers.Tokenizer.from_str(files[TOKENIZER])
        named, extra = named_tokens(files)
        check_unknown(data["model"], named)
        whole.no_truncation()
        whole.no_padding()
        whole.add_special_tokens([name for name in named.values() if whole.token_to_id(name) is not None])
        whole.add_tokens([one for one in extra if whole.token_to_id(one.content) is None])
        tokens = whole.get_added_tokens_decoder()
        is_text = {one: not token.special and (len(token.content) == 1 or token.content.isspace())
                   and token.content not in named.values() for one, token in tokens.items()}  # fmt: skip
        text_tokens = {token.content: one for one, token in tokens.items() if is_text[one]}
        special = {token.content: one for one, token in sorted(tokens.items()) if not is_text[one]}
        vocabulary, spell = whole.get_vocab(with_added_tokens=False), speller(data)
        size = max([*vocabulary.values(), *tokens]) + 1
        if size > MOST_IDS:
            raise ValueError(f"an id of {size - 1:,}")
        self.id_to_bytes = [b""] * size
        names_of = {one: name for name, one in special.items()}
        for token, one in vocabulary.items():
            if names_of.get(one, token) != token:
                raise ValueError(f"{token!r} has the id of a special token, {names_of[one]!r}")
            self.id_to_bytes[one] = spell(token)
        for text, one in text_tokens.items():
            self.id_to_bytes[one] = text.encode("utf-8")
        for one in special.values():
            self.id_to_bytes[one] = b""
        self.strips = {token.content: (token.lstrip, token.rstrip) for token in tokens.values()}

        end = named.get("eos_token") or named.get("sep_token")  # BERT has only the second
        self.ends = end_ids(files, special.get(end), size)
        aliases = dict.fromkeys((END_OF_TEXT, PAD), self.ends[0]) if self.ends else {PAD: 0}
        for name, role in ((PAD, "pad_token"), (MASK, "mask_token")):
            if named.get(role) in special:
                aliases[name] = special[named[role]]
        self.names = set(special)  # without aliases
        aliases = {name: one for name, one in aliases.items() if name not in special}
        self.special_ids = aliases | special  # `decode` spells an id by its last name
        self.add_parts(added)

        plain = without_specials(data, set(special), text_tokens)
        inside = plain | {key: without_prefix(data.get(key)) for key in ("normalizer", "pre_tokenizer")}
        self.backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
        same = inside == plain
        self.inside_backend = self.backend if same else tokenizers.Tokenizer.from_str(json.dumps(inside))
        steps = parts(data.get("pre_tokenizer"))
        once = bool(steps) and steps[0].get("prepend_scheme") == "first"  # no space after special tokens
        self.section_backend = self.inside_backend if once else self.backend
        for backend in (self.backend, self.inside_backend):
            backend.encode(UNHEARD)  # raises if there is nothing for unknown text
        self.begin, self.finish = frame(whole, files, special.get(named.get("bos_token")))

    @classmethod
    def from_data(cls, data: dict) -> "HfTokenizer":
        """Return the tokenizer with the contents `data`."""
        return cls(data["files"], data["added"], data["turns"])

    @property
    def eos_id(self) -> int:
        """The id that separates two documents."""
        if END_OF_TEXT not in self.special_ids:
            raise UserError(NO_END)
        return self.special_ids[END_OF_TEXT]

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text."""
        return list(dict.fromkeys([self.eos_id, *self.ends]))

    @property
    def separator(self) -> list[int]:
        """The ids between two documents."""
        return [self.eos_id, *self.begin]

    @property
    def turns(self) -> dict | None:
        """The markers of its chat template, or None."""
        turns = self.contents["turns"]
        return turns if turns and "refused" not in turns else None

    @property
    def refused(self) -> str:
        """The reason why there are no `turns`."""
        return (self.contents["turns"] or {}).get("refused", "it has no chat template")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return encoded(self.backend, texts)

    def encode_section(self, text: str) -> list[int]:
        """Return the ids of a text that follows a special token."""
        return encoded(self.section_backend, [text])[0]

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text."""
        return encoded(self.inside_backend, [text])[0]


def read_text(path: Path) -> str:
    """Return the text of a file. Raises `UserError` for one that is too large, or not in UTF-8."""
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: larger than {LARGEST // 2**20} MiB, so it is not the file of a tokenizer")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text in UTF-8 ({error})") from None


def chat_template(files: dict[str, str]) -> str | None:
    """Return the chat template, of several the one named `default`."""
    found = files.get(TEMPLATE) or json.loads(files.get(SETTINGS[1], "{}")).get("chat_template")
    if isinstance(found, list):
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    if not isinstance(found, str | None):
        raise ValueError("chat_template is not a text")
    return found


def named_tokens(files: dict[str, str]) -> tuple[dict[str, str], list[tokenizers.AddedToken]]:
    """Return the tokens that the settings name: by their role (`bos_token`), and those without one."""
    named, extra = {}, []
    for settings in (json.loads(files.get(name, "{}")) for name in SETTINGS):
        for key, value in settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str | None):
                named[key] = text
        more = [settings.get(key) or () for key in ("additional_special_tokens", "extra_special_tokens")]
        contents = [one for some in more for one in (some.values() if isinstance(some, dict) else some)]
        contents = [one["content"] if isinstance(one, dict) else one for one in contents]
        extra += [tokenizers.AddedToken(one, normalized=False, special=True) for one in contents]
        listed = sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
        for _, one in listed:
            flags = {key: one[key] for key in FLAGS if key in one}
            extra.append(tokenizers.AddedToken(one["content"], **flags))
    return {key: text for key, text in named.items() if text}, extra


def check_unknown(model: dict, named: dict[str, str]) -> None:
    """Tell the token for unknown text, which any text can reach, from those with another role. A model may
    have one for both (GPT-2)."""
    vocab, place = model["vocab"], model.get("unk_id")
    unknown = model.get("unk_token") if isinstance(vocab, dict) else place is not None and vocab[place][0]
    roles = [role for role, name in named.items() if name == unknown and role != "unk_token"]
    if roles and "merges" not in model:
        raise ValueError(f"text that it does not know would become its {roles[0]}, {unknown}")
    if roles:
        model["unk_token"] = None  # BPE of bytes knows everything


def end_ids(files: dict[str, str], eos: int | None, size: int) -> list[int]:
    """Return the ids that end a text: of generation_config.json, which may name several, and `eos`."""
    found = json.loads(files.get(GENERATION, "{}")).get("eos_token_id")
    found = [*(found if isinstance(found, list) else [found]), eos]
    return list(dict.fromkeys(one for one in found if type(one) is int and 0 <= one < size))


def frame(whole: tokenizers.Tokenizer, files: dict[str, str], bos: int | None) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before a text, or BOS if the settings ask for it in another
    way, and those that it puts after it."""
    encoding = whole.encode("a")
    pairs = [*zip(encoding.ids, encoding.special_tokens_mask)]
    before = [one for one, _ in takewhile(lambda pair: pair[1], pairs)]
    after = [one for one, _ in takewhile(lambda pair: pair[1], reversed(pairs[len(before) :]))]
    asked = json.loads(files.get(SETTINGS[1], "{}")).get("add_bos_token") is True
    return before or [bos] * (asked and bos is not None), after[::-1]


def read_hf_tokenizer(
    folder: str | Path, rows: int | None = None, ends=None, chat: bool = True
) -> HfTokenizer:
    """Return the tokenizer in `folder`, which may also be the path of its tokenizer.json.

    `rows`: of the model's embedding. A new model can have any number (None), so the tokenizer gets all
    special tokens of ours that it lacks. A model with weights gets those of ChatML only if it has no chat
    template and rows to spare, and is one for dialogues (`chat`). `ends`: the `eos_token_id` of the model, in
    place of a missing generation_config.json. Raises `UserError` for files that are no tokenizer, or one of
    more ids than `rows`.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == TOKENIZER and not folder.is_dir() else folder
    files = {name: read_text(folder / name) for name in FILES if (folder / name).is_file()}
    if GENERATION not in files and ends is not None:
        files[GENERATION] = json.dumps({"eos_token_id": ends})
    if TOKENIZER not in files:
        others = [name for name in OTHERS if (folder / name).is_file()]
        found = f"only {others[0]}" if others else "none" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: a {TOKENIZER} is needed, and there is {found}; the library transformers writes it: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        tokenizer = HfTokenizer(files)
        source = chat_template(files)
    except BaseException as error:  # the library raises plain Exception, and panics are not even that
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(
            f"{folder / TOKENIZER}: this file, or one beside it, is not of the format of the library "
            f"tokenizers {tokenizers.__version__} ({type(error).__name__}: {error})"
        ) from None
    if rows is not None and tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder / TOKENIZER}: its ids go up to {tokenizer.vocab_size - 1:,}, and the model has only "
            f"{rows:,} rows of embeddings: this is the tokenizer of another model"
        )
    ours = () if source or not chat else ("<|im_start|>", "<|im_end|>")
    ours = (*SPECIAL_TOKENS, *PART_TOKENS) if rows is None else ours
    missing = [name for name in ours if name not in tokenizer.names]
    if rows is None or tokenizer.vocab_size + len(missing) <= rows:
        tokenizer.add_parts(missing)
    if source:
        from load_data.tokenization.jinja_sandbox import read_turns  # Jinja takes 45 ms to import

        tokenizer.contents["turns"] = read_turns(source, named_tokens(files)[0], tokenizer.special_ids)
    if END_OF_TEXT not in tokenizer.special_ids:
        raise UserError(f"{folder}: {NO_END}")
    return tokenizer
