"""Checkpoints: a crash cannot corrupt them, and reading a stranger's file cannot run code.

Writing goes to a temporary file beside the target, which is flushed to disk and then renamed. A rename is
atomic: at every moment the name holds either the complete old file or the complete new one, even after a
power cut or `kill -9`.

Reading uses `weights_only=True` only. A pickle may name any Python function to be called while it is read;
the restricted reader accepts tensors and plain data and refuses everything else. Source:
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import UserError

FORMAT_VERSION = 2  # with every new format, teach `upgrade` to read the older one
PLAIN = (str, int, float, bool, type(None))


# --- names ----------------------------------------------------------------------------------------


def checkpoint_name(short: str, index: int, epoch: int) -> str:
    """Return `TinySeek_Pre3_0.pkl`: the name of checkpoint `index` in epoch `epoch` of stage `short`."""
    return f"TinySeek_{short}{index}_{epoch}.pkl"


def final_name(short: str) -> str:
    """Return `TinySeek_Pre_final.pkl`: the name of the result of stage `short`."""
    return f"TinySeek_{short}_final.pkl"


def stable_name(short: str) -> str:
    """Return `TinySeek_Pre_stable.pkl`: the name of the checkpoint from before the learning rate decays."""
    return f"TinySeek_{short}_stable.pkl"


def find_checkpoints(out: str | Path, short: str) -> list[Path]:
    """Return what `short` in `out` may be resumed from: the stable checkpoint, then by epoch and index."""
    pattern = re.compile(rf"TinySeek_{re.escape(short)}(\d+)_(\d+)\.pkl")
    found = [path for path in Path(out).glob("TinySeek_*.pkl") if pattern.fullmatch(path.name)]
    found.sort(key=lambda path: [int(n) for n in pattern.fullmatch(path.name).groups()[::-1]])
    stable = Path(out) / stable_name(short)
    return [stable, *found] if stable.is_file() else found


def latest_checkpoint(out: str | Path, short: str) -> Path | None:
    """Return the newest intermediate checkpoint, or None."""
    return next(reversed(find_checkpoints(out, short)), None)


def prune_checkpoints(out: str | Path, short: str, keep: int = 2) -> None:
    """Delete all but the stable and the newest `keep` checkpoints, and what was half-written or set aside."""
    found = [path for path in find_checkpoints(out, short) if path.name != stable_name(short)]
    pattern = re.compile(rf"TinySeek_{re.escape(short)}(\d+_\d+|_final|_stable)\.pkl\.(tmp|old)")
    leftovers = [path for path in Path(out).glob("TinySeek_*.pkl.*") if pattern.fullmatch(path.name)]
    for path in found[: max(0, len(found) - keep)] + leftovers:
        path.unlink(missing_ok=True)


# --- writing --------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, data: dict) -> None:
    """Write `data` (nested dicts and lists of tensors and plain values) to `path`, all or nothing.

    Raises `UserError` if the disk refuses; an earlier file at `path` is then intact. Raises `TypeError` for a
    value that the restricted reader would refuse later.
    """
    path = Path(path)
    check_plain(data, "checkpoint")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **data}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError; the OSError is its context
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and isinstance(error, (OSError, RuntimeError)):
            raise UserError(
                f"could not write {path}: {cause.strerror or cause}. Earlier checkpoints are intact: "
                "free some space, and run the command again (a training with --resume)"
            ) from error
        raise


def check_plain(value, where: str) -> None:
    """Raise `TypeError` naming the place if `value` holds anything but tensors and plain data."""
    if isinstance(value, dict) or type(value) in (list, tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(part, f"{where}[{key!r}]")
    elif type(value) not in PLAIN and not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}: checkpoints hold tensors and plain data only")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows and some network file systems refuse, and do not need it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- reading --------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Return the dictionary that `save_checkpoint` wrote, its tensors on `device`. No file can run code here.

    Raises `UserError` if the file is missing, damaged, not a checkpoint, carries code, or has another format.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            starts_as_zip = file.read(2) == b"PK"
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not starts_as_zip:
        raise UserError(f"{path}: not a TinySeek checkpoint (torch.save writes another format)")
    if not zipfile.is_zipfile(path):  # the table of contents is at the end of a zip file
        raise UserError(
            f"{path}: the checkpoint is cut short; delete it (the one before is good), or copy it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # `torch.load` ignores checksums and accepts a flipped bit
            if name := archive.testzip():
                raise zipfile.BadZipFile(name)
        data = torch.load(path, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a damaged file fails in as many ways as it has bytes
        match = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+)", str(error))
        if match:
            raise UserError(
                f"{path}: refused, it carries code or a foreign object ({match[1]}); checkpoints hold plain "
                "data only"
            ) from None
        raise UserError(
            f"{path}: the checkpoint is damaged ({type(error).__name__}); delete it (the one before is "
            "good), or copy it again"
        ) from None
    if not isinstance(data, dict) or "format_version" not in data:
        raise UserError(f"{path}: not a TinySeek checkpoint (it has no format_version)")
    if not isinstance(data.get("short"), str | None):  # a key of tables, which some values cannot be
        raise UserError(f"{path}: not a TinySeek checkpoint (its entry short is no text)")
    if data["format_version"] not in (1, FORMAT_VERSION):
        raise UserError(
            f"{path}: written in format {data['format_version']!r}, and this TinySeek reads formats 1 to "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    return upgrade(data)


def upgrade(data: dict) -> dict:
    """Return a checkpoint in the current format. 1 -> 2: the selector's weights were named `gate.*`."""
    if data["format_version"] == 1 and data.get("short") == "Gate":
        for holder in (data, data.get("training", {}).get("best") or {}):
            old = holder.get("weights", {})
            holder["weights"] = {name.replace("gate.", "selector.", 1): part for name, part in old.items()}
    return data


def load_weights(
    module: torch.nn.Module, state_dict: dict, where: str, names: Collection[str] | None = None
) -> None:
    """Copy all of `state_dict` into `module`; `where` names its source in the error.

    `names`: the weights that it must hold, those of an adapter for example; None for all. Raises `UserError`
    naming weights that are missing, unexpected, or of another shape or type; then nothing is copied.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if names is None or name in names}
    faults = {
        "missing": [name for name in own if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in own],
        "of another shape": [
            f"{name} {tuple(state_dict[name].shape)} where the model has {tuple(own[name].shape)}"
            for name in own
            if name in state_dict and state_dict[name].shape != own[name].shape
        ],
        "of another type": [
            f"{name} {state_dict[name].dtype} where the model has {own[name].dtype}"
            for name in own
            if name in state_dict and kind_of(state_dict[name]) != kind_of(own[name])
        ],
    }
    words = []
    for fault, found in faults.items():
        if found:
            more = ", ..." if found[3:] else ""
            words.append(f"{len(found)} {fault} ({', '.join(found[:3])}{more})")
    if words:
        raise UserError(
            f"{where} does not fit this model: weights {'; '.join(words)}. The model settings must be those "
            "it was trained with"
        )
    module.load_state_dict(state_dict, strict=names is None)


def kind_of(tensor: torch.Tensor) -> torch.dtype | str:
    """Return the dtype of integers, such as codes; floating-point numbers are all of one kind."""
    return "float" if tensor.is_floating_point() else tensor.dtype


def weights_digest(state_dict: dict[str, torch.Tensor]) -> str:
    """Return 16 hexadecimal digits that identify weights: names, shapes, dtypes and every bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]
