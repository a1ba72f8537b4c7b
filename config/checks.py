"""Limits of config fields, and the checks that enforce them.

A field declares its limits in its metadata, with the names of `RULES`. A section may also define `check()`
for constraints between fields. A violation raises a `UserError` that names the field, the value and the rule.
"""

import math
import operator
import types
import typing
from dataclasses import field, fields

from utils.errors import UserError

RULES = {
    "at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt,
    "choices": lambda value, choices: value in choices,
}  # fmt: skip


def option(default, **limits):
    """Return a dataclass field; `limits` are bounds by the names of `RULES`, for example `at_least=1`."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=limits)
    return field(default=default, metadata=limits)


def validate_section(name: str, section) -> None:
    """Check types and limits of all fields, then call the section's own `check()`."""
    hints = typing.get_type_hints(type(section))
    for item in fields(section):
        value = getattr(section, item.name)
        setattr(section, item.name, checked(f"{name}.{item.name}", value, hints[item.name], item.metadata))
    if hasattr(section, "check"):
        section.check()


def checked(key: str, value, hint, limits) -> object:
    """Return `value` if its type and limits are right (an int is accepted for a float)."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed if kind is not type(None))
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(kind.__name__ for kind in kinds) + (" or null" if type(None) in allowed else "")
        raise UserError(f"{key} must be {names}, not {value!r} ({type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} must be a finite number")
    if isinstance(value, list):
        (part_kind,) = next(typing.get_args(kind) for kind in allowed if typing.get_origin(kind) is list)
        if any(type(part) is not part_kind for part in value):
            parts = {str: "strings", int: "whole numbers"}[part_kind]
            raise UserError(f"{key} must be a list of {parts}, not {value!r}")
    for rule, bound in limits.items():
        if not RULES[rule](value, bound):
            words = f"{rule.replace('_', ' ')} {bound}"
            words = f"one of {', '.join(map(str, bound))}" if rule == "choices" else words
            raise UserError(f"{key}={value!r} must be {words}")
    return value
