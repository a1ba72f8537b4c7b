"""Reserve the items that later stages are scored on, before any training text is made.

An item is a short text such as `12 + 7`. A hash of the text reserves a tenth of all possible items, so every
stage on every machine agrees without a list, and no stage trains on a reserved item.
"""

import hashlib
import re

RESERVED_FRACTION = 0.1
# Sums of two small numbers, in any spacing, overlapping ones too. A longer number, a decimal or a name at
# either end makes it a different sum.
SMALL_SUM = re.compile(r"(?<![\w.])(?=(\d{1,2} ?[+-] ?\d{1,2})(?!\w|\.\d))")
COMMUTATIVE = re.compile(r"(\d+)([+*])(\d+)")


def unit_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone (SHA-256, the same on every machine)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def item_key(item: str) -> str:
    """Return `item` without white space, the smaller number first in a sum or product of two: whoever has
    seen `7 + 12` knows `12 + 7`."""
    item = "".join(item.split())
    match = COMMUTATIVE.fullmatch(item)
    return match[2].join(sorted(match.group(1, 3), key=int)) if match else item


def is_reserved(item: str) -> bool:
    """Return whether `item` is kept for scoring. Equal keys (see `item_key`) get equal answers."""
    return unit_hash("reserved:" + item_key(item)) < RESERVED_FRACTION


def holds_reserved_sum(text: str) -> bool:
    """Return whether a reserved sum of two small numbers can be read anywhere in `text`."""
    return any(map(is_reserved, SMALL_SUM.findall(text)))
