"""Which items later stages are scored on, decided before any training text is made.

An item is a short text such as `12 + 7`. A tenth of all possible items is reserved, by a hash of the text
alone: every stage, on every machine, agrees on the answer without a list, and no stage trains on a reserved
item.
"""

import hashlib

RESERVED_FRACTION = 0.1


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, evenly spread (SHA-256, the same on every machine)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def is_reserved(item: str) -> bool:
    """Whether `item` is kept for scoring. White space does not matter: `12+7` is `12 + 7`."""
    return unit_hash("reserved:" + "".join(item.split())) < RESERVED_FRACTION
