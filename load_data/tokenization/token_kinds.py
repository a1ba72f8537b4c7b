"""The kind of text of each token, to see whether experts specialise (`utils/plot_experts.py`).

    kind         tokens                                          in Python source
    white space  spaces, tabs and line breaks only               indentation, ends of lines
    keyword      a word of Python's grammar                      `def`, ` if`, `(not`
    name piece   letters without a space before them                `self`, `.append`, `ing`
    spaced word  letters after a space                           ` the`, ` x`
    number       digits                                          `7`
    sign         operators, brackets, punctuation and quotes     ` =`, `):\\n    `, `#`, three quotes
    CJK          Chinese, Japanese and Korean writing
    other        special tokens, parts of characters, emoji

Only the token's own text counts, not its context: `in` is a keyword inside a comment too.
"""

import keyword
import unicodedata

import numpy as np

from load_data.tokenization.tokenizer import Tokenizer

KINDS = ["white space", "keyword", "name piece", "spaced word", "number", "sign", "CJK", "other"]
SIGNS = ("P", "Sm", "Sc", "Sk")  # prefixes of Unicode categories
CJK_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")  # prefixes of Unicode names


def token_kinds(tokenizer: Tokenizer) -> tuple[list[str], np.ndarray]:
    """Return the names of the kinds, and the index (V,) of the kind of each id."""
    texts = (tokenizer.decode([one]) for one in range(tokenizer.vocab_size))
    return KINDS, np.array([KINDS.index(kind_of(text)) for text in texts])


def kind_of(text: str) -> str:
    """Return the kind of one token from its text; '' is a special token, U+FFFD a part of a character."""
    core = text.strip()
    if not text or "\ufffd" in text:
        return "other"
    if not core:
        return "white space"
    if core.lstrip("([{") in keyword.kwlist:
        return "keyword"
    if any(letter.isalpha() and unicodedata.name(letter, "").startswith(CJK_SCRIPTS) for letter in core):
        return "CJK"
    if core[0].isnumeric():
        return "number"
    if any(letter.isalpha() for letter in core) or not core.strip("_"):
        return "spaced word" if text[0].isspace() else "name piece"
    if any(letter.isnumeric() for letter in core):
        return "number"
    # Punctuation, and the symbols of operators and prices; emoji are other symbols.
    return "sign" if all(unicodedata.category(letter).startswith(SIGNS) for letter in core) else "other"
