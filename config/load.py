"""Build one validated `RunConfig` from a preset or JSON file, a checkpoint, flags and `--set`.

Precedence, weakest first: the defaults of `config/schema.py`, the preset or JSON file, the checkpoint that a
run starts from, the flags of the command line, `--set section.key=value`. An unknown section or key is an
error that names the nearest known one; nothing is guessed and nothing executed.
"""

import difflib
import json
import types
import typing
from dataclasses import asdict, fields
from pathlib import Path

from config.checks import validate_section
from config.schema import RunConfig
from utils.errors import UserError

PRESETS = Path(__file__).resolve().parent / "presets"
DEFAULT_PRESET = "laptop"


def preset_names(stage: str = "pre_train") -> list[str]:
    """Return the names that `--config` accepts. Presets of pre-training are in `presets/`, those of another
    stage in a subfolder named after it."""
    return sorted(path.stem for path in preset_folder(stage).glob("*.json"))


def preset_folder(stage: str) -> Path:
    """Return the folder with the presets of a stage."""
    return PRESETS if stage == "pre_train" else PRESETS / stage


def default_preset(stage: str = "pre_train") -> str:
    """Return the preset of a stage that runs without `--config`."""
    return DEFAULT_PRESET if stage == "pre_train" else "default"


def load_config(
    name: str | None = None,
    settings: list[str] = (),
    inherited: dict | None = None,
    flags: dict | None = None,
    stage: str = "pre_train",
) -> RunConfig:
    """Return the validated configuration of a run.

    Args:
        name: a preset or a JSON file; None for the stage's default preset.
        settings: texts `section.key=value`, which override everything else.
        inherited: sections taken from the checkpoint that a run starts from.
        flags: sections set by the other flags of the command line.
        stage: the stage whose presets contain `name`.
    """
    config = RunConfig()
    name = name or default_preset(stage)
    path = preset_folder(stage) / f"{name}.json" if not name.endswith(".json") else Path(name)
    if not path.is_file():
        hint = f"; presets: {', '.join(preset_names(stage))}" if path != Path(name) else ""
        raise UserError(f"--config {name}: no such {'file' if not hint else 'preset'}{hint}")
    apply_dict(config, read_json(path), where=str(path))
    apply_dict(config, inherited or {}, where="--init")
    kept = {key: getattr(config.data, key) for key in (inherited or {}).get("data", {})}
    if kept:
        validate_section("data", config.data)
    apply_dict(config, flags or {}, where="the command line")
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or key.count(".") != 1:
            raise UserError(f"--set {text}: write it as section.key=value, for example train.max_steps=100")
        section, name = key.strip().split(".")
        hint = typing.get_type_hints(type(find(config, section, "--set", "section"))).get(name)
        apply_dict(config, {section: {name: parse_value(value.strip(), hint)}}, where=f"--set {text}")
    config.validate()
    if config.data.val_fraction > (held_out := kept.get("val_fraction", 1.0)):
        raise UserError(
            f"data.val_fraction={config.data.val_fraction} is more than the {held_out} that the training of "
            "--init, or of a teacher, held out: omit the setting, or train that model with this fraction too"
        )
    if config.data.same_question != (rule := kept.get("same_question", config.data.same_question)):
        raise UserError(f"data.same_question must stay {rule}, as in --init: omit the setting")
    return config


def from_dict(data: dict, where: str) -> RunConfig:
    """Return a validated `RunConfig` from the nested dictionary in a checkpoint."""
    config = RunConfig()
    config.data.same_question = "exact"  # the default for older checkpoints, which lack the field
    apply_dict(config, data, where)
    return config.validate()


def to_dict(config: RunConfig) -> dict:
    """Return the configuration as plain nested data, for checkpoints."""
    return asdict(config)


def read_json(path: Path) -> dict:
    """Return the JSON object in `path`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
    except (OSError, ValueError, RecursionError) as error:  # not readable, not UTF-8, not JSON, or too deep
        raise UserError(f"{path}: cannot be read as JSON in UTF-8 ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with sections, found a {type(data).__name__}")
    return data


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object as a dictionary. Raise `ValueError` for a repeated key (`json` keeps the last)."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} occurs twice in one object: keep one")
    return dict(pairs)


def apply_dict(config: RunConfig, data: dict, where: str) -> None:
    """Write `{section: {key: value}}` into `config`. Unknown names are errors; `validate` checks types."""
    for section_name, values in data.items():
        section = find(config, section_name, where, "section")
        if not isinstance(values, dict):
            raise UserError(f"{where}: section {section_name} must be an object of settings, not {values!r}")
        for key, value in values.items():
            find(section, key, where, f"setting of section {section_name}")
            setattr(section, key, value)


def find(holder, name: str, where: str, what: str):
    """Return field `name` of a dataclass. For an unknown name, raise an error that suggests the nearest."""
    known = [item.name for item in fields(holder)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"{where}: unknown {what} {name!r}; {hint}")
    return getattr(holder, name)


def parse_value(text: str, hint) -> object:
    """Parse the text of `--set` as JSON, unless the field is a string (`hint` is the field's type)."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in allowed:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)
