"""A folder of the library sentence-transformers: an embedding model as a chain of modules.

    modules.json                        the chain: Transformer, Pooling, and possibly Normalize
    config.json, model.safetensors      the Transformer, an encoder without its head
    sentence_bert_config.json           max_seq_length
    1_Pooling/config.json               how the vectors of all tokens become one

Our embeddings are always unit vectors. Where Normalize is missing, only the direction is the same, and with
it the cosine of two.
"""

import os
from pathlib import Path
from typing import NamedTuple

from inference.hf.folder import read_json_file
from utils.errors import UserError

MODULES, LENGTH, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
CHAIN = ["Transformer", "Pooling", "Normalize"]
POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last"}


class SentenceFolder(NamedTuple):
    """The facts of a folder, but for the model itself."""

    body: Path  # the folder of the encoder and its tokenizer
    pooling: str
    length: int | None  # tokens of a text, those of its frame included; None: as the model allows


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Read all but the model itself. Raises `UserError` for what an embedding model of ours does not have."""
    where, modules = folder / MODULES, read_json_file(folder, MODULES, list)
    modules = [one if isinstance(one, dict) else {} for one in modules]
    kinds = [str(one.get("type")).rpartition(".")[2] for one in modules]
    if kinds not in (CHAIN, CHAIN[:2]):
        found = ", ".join(kinds)[:200]
        raise UserError(f"{where}: the modules {found} are not supported, only {', '.join(CHAIN)}")
    body, place = (inside(folder, one.get("path"), where) for one in modules[:2])
    prompts = optional(folder, PROMPTS).get("prompts") or {}
    if not isinstance(prompts, dict) or any(prompts.values()):
        raise UserError(f"{folder / PROMPTS}: prompts={prompts!r} before texts are not supported")
    settings = optional(body, LENGTH)
    if settings.get("do_lower_case"):
        raise UserError(f"{body / LENGTH}: do_lower_case is not supported: only the tokenizer changes texts")
    length = settings.get("max_seq_length") or optional(body, "tokenizer_config.json").get("model_max_length")
    if type(length) is not int:  # some tokenizers say 1e30
        length = None
    return SentenceFolder(body, pooling_of(read_json_file(place, "config.json"), place), length)


def pooling_of(settings: dict, place: Path) -> str:
    """Return the name of a pooling, from `pooling_mode`, or the only old switch that is on."""
    old = "pooling_mode_"
    on = [name.removeprefix(old) for name, value in settings.items() if name.startswith(old) and value]
    if "pooling_mode" in settings:
        on = [str(settings["pooling_mode"])]
    if len(on) != 1 or on[0] not in POOLINGS:
        raise UserError(f"{place / 'config.json'}: pooling {on} is not supported, only one of {[*POOLINGS]}")
    return POOLINGS[on[0]]


def inside(folder: Path, path, where: Path) -> Path:
    """Return the folder of a module: this one, or one right in it. A stranger wrote `path`."""
    if path == "":
        return folder
    if not isinstance(path, str) or Path(path).name != path or "\\" in path or path == "..":
        raise UserError(f"{where}: {path!r} is not a folder in this one: refused")
    return folder / path


def optional(folder: Path, name: str) -> dict:
    """Return a JSON object, empty if there is no such file."""
    return read_json_file(folder, name) if os.path.exists(folder / name) else {}
