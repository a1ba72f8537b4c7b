"""Text to ids with a tokenizer.json, but never to a special token; and the bytes that each token stands for.

A special token can be reached in three ways: as an "added token", which `tokenizers` cuts out of a text
before everything else; as an entry of the vocabulary that equals a piece of text; and by a merge. All three
are removed from the JSON, and every other id stays as it was. The token for unknown text stays too.
"""

import re
from collections.abc import Callable

from load_data.tokenization.base import byte_characters

BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token of one byte, in vocabularies of sentencepiece


def without_specials(data: dict, special: set[str], text_tokens: dict[str, int]) -> dict:
    """Return the JSON of a tokenizer in which no text reaches the tokens `special`. `text_tokens` are added
    tokens that stand for text (see `HfTokenizer`), with their ids."""
    model, vocab = data["model"] | {"dropout": None}, data["model"]["vocab"]
    kept = [one for one in data.get("added_tokens") or () if one["content"] in text_tokens]
    if isinstance(vocab, list):  # Unigram: a place is an id, and the empty piece matches no text
        model["vocab"] = [["" if piece in special else piece, score] for piece, score in vocab]
        kept = []  # they would get other ids
    else:
        gone = special - {model.get("unk_token")}
        model["vocab"] = {token: one for token, one in vocab.items() if token not in gone} | text_tokens
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if special.isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    off = dict.fromkeys(("truncation", "padding", "post_processor"))
    return data | off | {"model": model, "added_tokens": kept}


def without_prefix(part: dict | None) -> dict | None:
    """Return a normalizer or a pre-tokenizer that puts no space before the first word of a text."""
    kind = part and part["type"]
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        first = without_prefix(part[key][0]) if part[key] else None
        return part | {key: [first] * bool(first) + part[key][1:]}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {"add_prefix_space": False} if kind == "ByteLevel" else part


def parts(part: dict | None) -> list[dict]:
    """Return the steps of a normalizer, a pre-tokenizer or a decoder, in order."""
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    return next(part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part)


def speller(data: dict) -> Callable[[str], bytes]:
    """Return the function from a token of the vocabulary to its bytes, as the decoder of the JSON spells it.

    Trap: decoders drop the space before the first word of a text. A token does not know whether it is the
    first, so it keeps its space.
    """
    steps = parts(data.get("decoder")) or parts(data.get("pre_tokenizer"))
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        byte_of = {letter: byte for byte, letter in enumerate(byte_characters())}
        return lambda token: (
            bytes(map(byte_of.get, token)) if byte_of.keys() >= set(token) else token.encode("utf-8")
        )
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"]["prefix"]
        return lambda token: (token.removeprefix(prefix) if token.startswith(prefix) else f" {token}").encode(
            "utf-8"
        )
    if "BPEDecoder" in kinds:
        suffix = kinds["BPEDecoder"]["suffix"]
        return lambda token: re.sub(re.escape(suffix) + "$", " ", token).encode("utf-8")
    swaps = [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    swaps += [(step["pattern"]["String"], step["content"]) for step in steps
              if step["type"] == "Replace" and "String" in step["pattern"]]  # fmt: skip
    if not swaps and "ByteFallback" not in kinds:
        return lambda token: f" {token}".encode()  # `tokenizers` joins whole words with spaces

    def spelled(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in swaps:
            token = token.replace(old, new)
        return token.encode("utf-8")

    return spelled
