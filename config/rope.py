"""The settings of the rules for longer contexts: a `rope_scaling` dictionary, checked.

It may use the old Hugging Face spelling ({"type": "yarn", "factor": 4.0}) or the new one ("rope_type"), and
has the parameters of its rule beside it. modules/rope_scaling.py explains the rules and computes them.

Without a factor, `yarn` and `longrope` take max_position_embeddings / original_max_position_embeddings, as
Hugging Face does. The trained length of `dynamic` is max_position_embeddings there, without another choice.
Generation ends at that length here, so `dynamic` also takes original_max_position_embeddings.
"""

import math

from utils.errors import UserError

NEEDS = {  # the parameters of each rule and their defaults (None: required; 0: not given)
    "default": {},
    "linear": {"factor": None},
    "ntk": {"factor": None},
    "dynamic": {"factor": None, "original_max_position_embeddings": 0},
    "yarn": {
        "factor": 0, "original_max_position_embeddings": 0, "beta_fast": 32.0, "beta_slow": 1.0,
        "attention_factor": 0, "mscale": 0, "mscale_all_dim": 0, "truncate": True,
    },
    "llama3": {
        "factor": None, "low_freq_factor": None, "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "longrope": {
        "short_factor": None, "long_factor": None, "original_max_position_embeddings": None, "factor": 0,
        "attention_factor": 0,
    },
}  # fmt: skip


def positive(value) -> bool:
    """Return whether `value` is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def read_scaling(scaling: dict | None, theta: float) -> tuple[str, float, dict]:
    """Check a `rope_scaling` dictionary in either spelling; return (rule, theta, all parameters).

    A null counts as absent. Raise `UserError` for anything unknown or wrong.
    """
    given = {key: value for key, value in (scaling or {}).items() if value is not None}
    rule = given.pop("type", "default")
    rule = given.pop("rope_type", rule)
    if given.get("partial_rotary_factor") == 1:  # the whole head, in Hugging Face's terms
        del given["partial_rotary_factor"]
    if not isinstance(rule, str) or rule not in NEEDS:
        raise UserError(f"model.rope_scaling: unknown rope_type {rule!r}; known: {', '.join(NEEDS)}")
    for key, value in given.items():
        kind, right = "a positive number", positive(value)
        if key == "truncate":
            kind, right = "true or false", isinstance(value, bool)
        elif key in ("short_factor", "long_factor"):
            wrong = [one for one in value if not positive(one)] if isinstance(value, list) else [value]
            kind, right, value = "a list of positive numbers", not wrong, wrong[:1]
        if not right:
            raise UserError(f"model.rope_scaling: {key} must be {kind}, not {value!r}")
    theta = given.pop("rope_theta", theta)
    if theta <= 1:
        raise UserError(f"model.rope_scaling: rope_theta must be above 1, not {theta}")
    values = dict(NEEDS[rule])
    unknown = set(given) - set(values)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"model.rope_scaling: {rule} does not take {names}; it takes {list(values)}")
    values.update(given)
    missing = [key for key, value in values.items() if value is None]
    if rule == "yarn" and not values["factor"] and not values["original_max_position_embeddings"]:
        missing = ["factor"]
    if missing:
        raise UserError(f"model.rope_scaling: {rule} needs {', '.join(missing)}")
    if 0 < values.get("factor", 0) < 1:
        raise UserError(f"model.rope_scaling: factor must be at least 1, not {values['factor']}")
    if rule == "longrope" and values["original_max_position_embeddings"] <= 1:
        raise UserError("model.rope_scaling: longrope needs original_max_position_embeddings above 1")
    for small, large in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if small in values and not values[small] < values[large]:
            raise UserError(f"model.rope_scaling: {small}={values[small]} must be below {large}")
    return rule, float(theta), values
