"""Text to token ids and back.

Three kinds share one class (base.py). `bpe` is byte-level byte-pair encoding (Sennrich et al., arXiv
1508.07909; bytes as in GPT-2): every text is a sequence of UTF-8 bytes, so nothing is ever unknown, and
frequent pairs are merged into longer tokens (load_data/byte_pair.py does it by hand). `char` gives one id to
each distinct character. `hf` is any tokenizer of Hugging Face's format (hf_tokenizer.py).

Special tokens exist only as ids: `encode` cannot reach them, so no text can produce one. Only the chat
template writes them. Those that mark turns take the first ids. Those that mark parts of an answer take the
last: a tokenizer from before they existed has none of them, and everything else has the ids it had then.
"""

from collections.abc import Sequence

import tokenizers
from tokenizers import models, pre_tokenizers

from load_data.tokenization.base import PART_TOKENS, SPECIAL_TOKENS, Tokenizer, byte_characters, encoded
from load_data.tokenization.base import END_OF_TEXT, MASK, PAD, SENTINELS  # noqa: F401 - as of this file
from load_data.tokenization.hf_tokenizer import HfTokenizer  # noqa: F401 - the third kind

UNKNOWN = "<unk>"

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

    @classmethod
    def from_data(cls, data: dict) -> "BpeTokenizer":
        """Return the tokenizer with the contents `data`."""
        merges = [tuple(pair.split(" ")) for pair in data["merges"]]
        return cls(merges, data["pattern"], data.get("parts", ()))

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

    @classmethod
    def from_data(cls, data: dict) -> "CharTokenizer":
        """Return the tokenizer with the contents `data`."""
        return cls(data["characters"], data.get("parts", ()))

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
