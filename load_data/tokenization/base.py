"""The base class of all tokenizers. Import it from tokenizer.py, which has all kinds."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import tokenizers

from utils.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "User：", "Assistant：", "System：", PAD)
PART_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MASK = "<|mask|>"  # in the place of a token that an encoder predicts
SENTINELS = tuple(f"<extra_id_{n}>" for n in range(32))  # in the place of spans; the names of T5's
KINDS: dict[str, type["Tokenizer"]] = {}


class Tokenizer:
    """The base class of all kinds. A subclass sets these attributes, and encodes."""

    kind: str
    contents: dict  # all else that `from_json` needs
    special_ids: dict[str, int]
    id_to_bytes: list[bytes]  # the bytes of each id; special tokens have none
    parts_key = "parts"  # of `contents`: special tokens with the last ids
    strips: dict[str, tuple[bool, bool]] = {}  # special tokens that swallow white space before or after them
    turns: dict | None = None  # the markers of a chat template of its own (turns.py)
    refused = "only a tokenizer of the kind hf can have them"  # why there are none

    def __init_subclass__(cls):
        KINDS[cls.kind] = cls

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

    @cached_property
    def finish(self) -> list[int]:
        """The ids that an encoder reads after a text: here none."""
        return []

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

    def framed(self, ids: list[int]) -> list[int]:
        """Return the ids of a text as an encoder reads it ([CLS] and [SEP] around it in BERT)."""
        return [*self.begin, *ids, *self.finish]

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
            self.contents[self.parts_key] = [*self.contents.get(self.parts_key, ()), *names]

    def with_special(self, names: Sequence[str]) -> "Tokenizer":
        """Return a tokenizer that has the special tokens `names` too: itself, or a copy with more ids."""
        missing = [name for name in names if name not in self.special_ids]
        if not missing:
            return self
        more = Tokenizer.from_json(self.to_json())
        more.add_parts(missing)
        return more

    def to_json(self) -> str:
        """Return the whole tokenizer as JSON text."""
        return json.dumps({"kind": self.kind, **self.contents}, ensure_ascii=False)

    @classmethod
    def from_data(cls, data: dict) -> "Tokenizer":
        """Return the tokenizer of this kind with the contents `data`."""
        raise NotImplementedError

    @staticmethod
    def from_json(text: str, where: str = "tokenizer") -> "Tokenizer":
        """Return the tokenizer that `to_json` wrote, or raise a `UserError` that begins with `where`."""
        try:
            data = json.loads(text)
            if data["kind"] in KINDS:
                return KINDS[data["kind"]].from_data(data)
            problem = f"unknown kind {data['kind']!r}"
        except BaseException as error:  # a bad pattern raises plain Exception, and panics are not even that
            if isinstance(error, KeyboardInterrupt):
                raise
            problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: not a tokenizer that TinySeek wrote ({problem})")


def byte_characters() -> list[str]:
    """Return the visible character that represents each of the 256 bytes (GPT-2's table).

    Printable Latin-1 bytes represent themselves; the rest are moved to U+0100 and beyond, so that
    vocabularies and merges contain neither white space nor control characters.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


def encoded(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text; a lone surrogate, which is not a character, is read as U+FFFD."""
    try:
        encodings = backend.encode_batch_fast(texts)
    except TypeError:  # the library's answer to a lone surrogate
        texts = [without_surrogates(text) for text in texts]
        encodings = backend.encode_batch_fast(texts)
    return [encoding.ids for encoding in encodings]


def without_surrogates(text: str) -> str:
    """Return `text` with U+FFFD for each lone surrogate (from JSON escapes and terminals)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
