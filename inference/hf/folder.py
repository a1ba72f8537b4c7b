"""Read a Hugging Face folder that may come from a stranger, and write a new one.

Only plain files directly in the folder are opened. A safetensors file is a table of names, dtypes, shapes and
places, and then numbers: nothing in it can run. Pickles (`pytorch_model.bin`) are refused. The table is
compared with what the model needs before any number is read.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from utils.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COUNT = "embeddings.position_ids"  # 0, 1, 2, ..: a buffer that old versions of transformers stored
DTYPES = ("F64", "F32", "F16", "BF16")
MOST_JSON = 64 * 2**20  # bytes
MAPPED = 2**24  # bytes to read before a file is closed and opened again; a larger tensor is read whole


def read_json_file(folder: Path, name: str, kind: type = dict):
    """Return the JSON object in `folder / name`, or of another `kind` (list)."""
    path = folder / name
    if not os.path.isfile(path):  # a pipe or a device may never end
        raise UserError(f"{path}: no such file; a Hugging Face folder has one")
    try:
        if path.stat().st_size > MOST_JSON:
            raise UserError(f"{path}: larger than {MOST_JSON:,} bytes: not a file of settings")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(data, kind):
        wanted = "object" if kind is dict else kind.__name__
        raise UserError(f"{path}: expected a JSON {wanted}, found a {type(data).__name__}")
    return data


class Stored(NamedTuple):
    """The place and form of a tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, ..


def tensor_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: those of its index, or the only one."""
    if os.path.exists(folder / INDEX):
        files = read_json_file(folder, INDEX).get("weight_map")
        if (
            not isinstance(files, dict)
            or not files
            or not all(isinstance(one, str) for one in files.values())
        ):
            raise UserError(
                f"{folder / INDEX}: weight_map must name a file for each weight; download it again"
            )
        names = sorted(set(files.values()))
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise UserError(
                    f"{folder / INDEX}: {name!r} is not a .safetensors file of this folder: refused"
                )
        return [folder / name for name in names]
    if os.path.exists(folder / SINGLE):
        return [folder / SINGLE]
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in folder.glob(kind))
    found = f"only {pickles[0]}, a pickle, which could run code" if pickles else "no weights"
    raise UserError(f"{folder}: {found}; needed is {SINGLE}, or {INDEX} and its files")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return name -> place and form of every tensor of a model, from the tables of its files alone."""
    found = {}
    for path in tensor_files(folder):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  not a dictionary
                if name.endswith(COUNT):
                    continue
                part = file.get_slice(name)
                if name in found:
                    raise UserError(
                        f"{path}: {name} is in {found[name].path.name} too: keep one of the files"
                    )
                found[name] = Stored(path, tuple(part.get_shape()), str(part.get_dtype()))
    odd = [f"{name} ({one.dtype})" for name, one in found.items() if one.dtype not in DTYPES]
    if odd:
        raise UserError(
            f"{folder}: {listed(odd)} of a quantized or unknown dtype; known: {', '.join(DTYPES)}"
        )
    return found


def safetensors_package():
    """Return the package `safetensors`, which only the commands for Hugging Face's files need."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "Hugging Face's files need the package safetensors: pip install safetensors"
        ) from None
    return safetensors


def open_tensors(path: Path):
    """Open a safetensors file, mapped into memory; its table is checked against the length of the file."""
    package = safetensors_package()
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; download it again")
    try:
        return package.safe_open(path, framework="pt")
    except (OSError, package.SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); download it again") from None


def read_into(places: list[tuple[torch.Tensor, str]], stored: dict[str, Stored]) -> None:
    """Copy tensors by name into `places`, (destination, name), converted to their dtype.

    Trap: what was read of a mapped file counts as memory until it is closed, so it is opened again and again.
    """
    waiting = sorted(places, key=lambda place: stored[place[1]].path, reverse=True)
    while waiting:
        path, size = stored[waiting[-1][1]].path, 0
        with open_tensors(path) as file:
            while waiting and stored[waiting[-1][1]].path == path and size < MAPPED:
                place, name = waiting.pop()
                place.copy_(file.get_tensor(name))
                size += place.numel() * 4


def listed(names, most: int = 6) -> str:
    """Return names as text, the first `most` of them. A stranger's may be long, or codes for a terminal."""
    names = [(name if name.isprintable() else repr(name))[:100] for name in names]
    more = f", .. ({len(names)} in all)" if names[most:] else ""
    return ", ".join(names[:most]) + more


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` at the end, or vanishes if writing fails."""
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name a new folder")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()  # empty; Windows renames to new names only
        temporary.replace(folder)
    except (OSError, safetensors_package().SafetensorError) as error:  # the latter for a full disk too
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"could not write {folder}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
