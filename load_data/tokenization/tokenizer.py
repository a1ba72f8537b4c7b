"""Text to token ids and back.

Three kinds share one class. `bpe` is byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; bytes as
in GPT-2): every text is a sequence of UTF-8 bytes, so nothing is ever unknown, and frequent pairs are merged
into longer tokens (load_data/byte_pair.py does it by hand). `char` gives one id to each distinct character.
`hf` is any tokenizer of Hugging Face's format (hf_tokenizer.py).

Special tokens exist only as ids: `encode` cannot reach them, so no text can produce one. Only the chat
template writes them. Those that mark turns take the first ids. Those that mark parts of an answer take the
last: a tokenizer from before they existed has none of them, and everything else has the ids it had then.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from utils.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
UNKNOWN = "<unk>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "User：", "Assistant：", "System：", PAD)
PART_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# BPE merges only within the pieces that this pattern cuts, from left to right: a word with one leading space
# or sign; a single digit, so that sums can be computed digit by digit; signs with the line break and
# indentation that follow; line breaks with indentation; other white space. Designed for code: 3.85 bytes per
# token on held-out Python with 4096 tokens, where GPT-2's pattern with single digits reaches 3.50.
#
# A line break at the end of a text is a piece of its own, so that encode(text + "\n") == encode(text) +
# encode("\n") for every text that does not end in one. Hugging Face's chat templates encode a question and
# the line break after it as one text, ours separately; so both have the same ids. `(?:(?<!\n)|(?=[\s\S]))`
# says it: a piece does not end in a line break, or more follows. (Engines disagree on \z, \Z and $.) Texts
# that go on, and documents, are encoded by `encode_open`, which knows no such exception.
SPLIT_PATTERN = (
    r"(?:[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?:\s*[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*|[ \t]+(?!\S)|\s+)(?:(?<!\n)|(?=[\s\S]))|\n"
)


def byte_characters() -> list[str]:
    """Return the visible character that represents each of the 256 bytes (GPT-2's table).

    Printable Latin-1 bytes represent themselves; the rest are moved to U+0100 and beyond, so that
    vocabularies and merges contain neither white space nor control characters.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


class Tokenizer:
    """The base class of all kinds. A subclass sets these attributes, and encodes."""

    kind: str
    contents: dict  # all else that `from_json` needs
    special_ids: dict[str, int]
    id_to_bytes: list[bytes]  # the bytes of each id; special tokens have none
    parts_key = "parts"  # of `contents`: special tokens with the last ids
    strips: dict[str, tuple[bool, bool]] = {}  # special tokens that swallow white space before, or after, them
    turns: dict | None = None  # the markers of a chat template of its own (turns.py)
    refused = "only a tokenizer of the kind hf can have them"  # why there are none

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.id_to_bytes)

    @property
    def eos_id(self) -> int:
        """The id that separates two documents."""
        return self.special_ids[END_OF_TEXT]

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text."""
        return [self.eos_id]

    @cached_property
    def begin(self) -> list[int]:
        """The ids that begin a text: here it follows another one."""
        return [self.eos_id]

    @property
    def separator(self) -> list[int]:
        """The ids between two documents."""
        return [self.eos_id]

    @property
    def pad_id(self) -> int:
        """The id that pads rows."""
        return self.special_ids[PAD]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(V,) int32: UTF-8 bytes of each id, 0 for special tokens; for bits per byte."""
        return np.array([len(part) for part in self.id_to_bytes], dtype=np.int32)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that identify this tokenizer."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, never a special one except `<unk>` for what `char` does not know."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        raise NotImplementedError

    def encode_section(self, text: str) -> list[int]:
        """Return the ids of a text that follows a special token."""
        return self.encode(text)

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text."""
        return self.encode(text)

    def encode_open(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text as the beginning of a longer one: of a text that a model continues, and
        of a document, whose end is a token of its own."""
        return self.encode_batch(texts)

    def decode(self, ids, skip_special: bool = True) -> str:
        """Return the text of `ids`, special tokens left out or spelled out; invalid bytes become U+FFFD.

        A model may have more ids than its tokenizer (a padded vocabulary): the surplus has no text.
        """
        names = {} if skip_special else self.special_ids
        spelled = {number: name.encode("utf-8") for name, number in names.items()}
        known = (int(one) for one in ids if one < self.vocab_size)
        parts = (spelled.get(one, self.id_to_bytes[one]) for one in known)
        return b"".join(parts).decode("utf-8", errors="replace")

    def add_parts(self, names: Sequence[str]) -> None:
        """Give the part tokens `names` the ids after all others. Without any, the JSON is of the old form."""
        self.special_ids |= {name: one for one, name in enumerate(names, start=self.vocab_size)}
        self.id_to_bytes += [b""] * len(names)
        if names:
            self.contents[self.parts_key] = list(names)

    def to_json(self) -> str:
        """Return the whole tokenizer as JSON text."""
        return json.dumps({"kind": self.kind, **self.contents}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str, where: str = "tokenizer") -> "Tokenizer":
        """Return the tokenizer that `to_json` wrote, or raise a `UserError` that begins with `where`."""
        try:
            data = json.loads(text)
            if data["kind"] == "char":
                return CharTokenizer(data["characters"], data.get("parts", ()))
            if data["kind"] == "bpe":
                merges = [tuple(pair.split(" ")) for pair in data["merges"]]
                return BpeTokenizer(merges, data["pattern"], data.get("parts", ()))
            if data["kind"] == "hf":
                from load_data.tokenization.hf_tokenizer import HfTokenizer  # which imports this file

                return HfTokenizer(data["files"], data["added"], data["turns"])
            problem = f"unknown kind {data['kind']!r}"
        except Exception as error:  # noqa: BLE001 - a bad pattern raises plain Exception
            problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: not a tokenizer that TinySeek wrote ({problem})")


class BpeTokenizer(Tokenizer):
    """Byte-level BPE: special tokens, the 256 bytes, one token per merge in order of training, and part
    tokens."""

    kind = "bpe"

    def __init__(
        self, merges: list[tuple[str, str]], pattern: str = SPLIT_PATTERN, parts: Sequence[str] = PART_TOKENS
    ):
        """`merges`: pairs of tokens, spelled in `byte_characters`, in order of training. `parts`: the part
        tokens, none in a tokenizer from before they existed."""
        self.merges = merges
        self.contents = {"pattern": pattern, "merges": [" ".join(pair) for pair in merges]}
        self.special_ids = {name: one for one, name in enumerate(SPECIAL_TOKENS)}
        characters = byte_characters()
        vocabulary = {letter: one for one, letter in enumerate(sorted(characters), start=len(SPECIAL_TOKENS))}
        for left, right in merges:
            if left not in vocabulary or right not in vocabulary:
                raise ValueError(f"merge of {left!r} and {right!r}, which are not both tokens")
            # Two merges may give the same token ("a" + "bc", "ab" + "c"): it has one id.
            vocabulary.setdefault(left + right, len(SPECIAL_TOKENS) + len(vocabulary))
        byte_of = {letter: byte for byte, letter in enumerate(characters)}
        self.id_to_bytes = [b""] * len(SPECIAL_TOKENS)
        self.id_to_bytes += [bytes(byte_of[letter] for letter in token) for token in vocabulary]
        self.add_parts(parts)
        self.backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        self.backend.pre_tokenizer = split_and_spell(pattern)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return encoded(self.backend, texts)

    def encode_open(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text as the beginning of a longer one: a line break at the end is not set
        apart. Otherwise that would tell a model that the document ends."""
        more = [text.endswith("\n") for text in texts]
        batch = self.encode_batch([text + "x" * one for text, one in zip(texts, more)])
        return [ids[: len(ids) - one] for ids, one in zip(batch, more)]


class CharTokenizer(Tokenizer):
    """One id per character: special tokens, `<unk>`, the known characters by code point, part tokens.

    An unknown character becomes one `<unk>` for each of its UTF-8 bytes, so that bits per byte counts it.
    """

    kind = "char"

    def __init__(self, characters: str, parts: Sequence[str] = PART_TOKENS):
        """`characters`: each known character once, sorted. `parts`: as for `BpeTokenizer`."""
        if list(characters) != sorted(set(characters)):
            raise ValueError("characters must be sorted and distinct")
        self.contents = {"characters": characters}
        self.special_ids = {name: one for one, name in enumerate((*SPECIAL_TOKENS, UNKNOWN))}
        first = len(self.special_ids)
        self.ids_of = {character: [one] for one, character in enumerate(characters, start=first)}
        self.id_to_bytes = [b""] * first + [character.encode("utf-8") for character in characters]
        self.id_to_bytes[first - 1] = b"\xff"  # <unk>: some byte; not UTF-8, so that it decodes to U+FFFD
        self.add_parts(parts)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; see the class for characters that are not known."""
        known, unknown = self.ids_of, [self.special_ids[UNKNOWN]]
        return [
            [i for one in text for i in known.get(one) or unknown * len(one.encode("utf-8", "surrogatepass"))]
            for text in texts
        ]


def split_and_spell(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that cuts text by `pattern` and spells each piece in `byte_characters`."""
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def encoded(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text; a lone surrogate, which is not a character, is read as U+FFFD."""
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError:  # the library's answer to a lone surrogate
        texts = [without_surrogates(text) for text in texts]
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def without_surrogates(text: str) -> str:
    """Return `text` with U+FFFD for each lone surrogate (from JSON escapes and terminals)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
