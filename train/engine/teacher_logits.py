"""The teacher's logits, computed once and kept on disk: for each label, the K likeliest tokens.

    ids (N, K) uint16, logprobs (N, K) fp16 of N supervised tokens          4 N K bytes up to 65,536 tokens
    -> teacher_ids (B, T, K), teacher_logprobs (B, T, K) in each micro-batch, 0 where there is no label

The teacher then reads the data once instead of in every epoch, and does not run while the student trains. All
other tokens are known only by their common probability (`distill.top_k`).

This works for dialogues only. They do not attend to each other, and each begins at position 0, so the
teacher's logits are the same in any row, order and epoch. Windows of text begin elsewhere in each epoch: the
tokens before a label, and with them the logits, change.

fp16 rounds log p by at most 2^-11 of it, so p by at most 2^-11 p |log p| < 0.0002. Trap: K rounded
probabilities may sum to more than 1, see modules/distillation/divergence.py.

The folder `teacher_logits_<hash>` of the cache serves resumed runs and other students. The hash covers
teacher, dialogues, K and temperature. A checksum finds damaged files.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from inference.generation.load import Loaded
from load_data.chat.chat_data import ChatData, Samples
from load_data.chat.chat_loader import DialogueRows
from load_data.loader import IGNORED
from load_data.packing import REPOSITORY, prepared_folder
from modules.distillation.divergence import top_outcomes
from utils.errors import UserError

FILES = ("ids", "logprobs")


class StoredLogits(DialogueRows):
    """Rows of dialogues with the stored logits of their labels; `ids` and `logprobs` (N, K)."""

    def __init__(self, rows: DialogueRows, ids: np.ndarray, logprobs: np.ndarray):
        vars(self).update(vars(rows))
        self.stored = ids, logprobs
        targets = rows.samples.targets
        number = np.where(targets, np.cumsum(targets) - 1, 0)  # of each label, among all of them
        numbers = Samples(number, targets, np.diff(rows.samples.bounds))
        self.places = DialogueRows(numbers, rows.sequence_length, rows.packing, pad_id=0)

    def batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return the tensors of `DialogueRows.batch`, `teacher_ids` and `teacher_logprobs` (B, T, K)."""
        batch, place = super().batch(rows), self.places.batch(rows)["labels"]
        keep = place != IGNORED
        ids, logprobs = (torch.from_numpy(part[place[keep].numpy()]) for part in self.stored)
        shape = (*place.shape, ids.shape[1])
        batch["teacher_ids"] = torch.zeros(shape, dtype=torch.long)
        batch["teacher_logprobs"] = torch.zeros(shape)
        batch["teacher_ids"][keep], batch["teacher_logprobs"][keep] = ids.long(), logprobs.float()
        return batch


def store_logits(source, data: ChatData, teacher: Loaded, config, machine) -> Path:
    """Give the batches of `source`, a `LoaderSource` of dialogues, the teacher's logits, computed now or
    found in the cache; return their folder."""
    settings, rows = config.distill, source.loader.rows
    decides = [teacher.digest, data.digest, settings.top_k, settings.temperature]
    given = (write_folder, rows, teacher, config, machine)
    cache = REPOSITORY / config.data.cache_dir
    folder = machine.read(prepared_folder, cache, "teacher_logits", decides, *given)
    count = int(rows.samples.targets.sum())
    source.loader.rows = StoredLogits(rows, *read_folder(folder, count, settings.top_k))
    return folder


@torch.no_grad()
def write_folder(folder: Path, rows: DialogueRows, teacher: Loaded, config, machine) -> None:
    """Write the teacher's logits of all labels, in the order of the dialogues."""
    settings, size = config.distill, config.train.batch_size
    vocabulary = teacher.tokenizer.vocab_size  # the model may have more ids, which no token has
    wide = "uint16" if vocabulary <= 2**16 else "int32"
    lines = rows.arrange(range(len(rows.samples)))
    shape = (int(rows.samples.targets.sum()), settings.top_k)
    ids, logprobs = np.zeros(shape, wide), np.zeros(shape, "float16")
    places = StoredLogits(rows, ids, logprobs).places
    model = teacher.model.to(machine.device)
    for first in tqdm(range(0, len(lines), size), "the teacher's logits", leave=False, disable=None):
        chosen = lines[first : first + size]
        batch = {key: value.to(machine.device) for key, value in rows.batch(chosen).items()}
        keep, labels = batch.pop("labels") != IGNORED, places.batch(chosen)["labels"]
        with machine.autocast():
            logits = model.logits(model(**batch, last_only=True).hidden[keep])[:, :vocabulary]
        found = top_outcomes(logits, settings.top_k, settings.temperature)
        place = labels[labels != IGNORED].numpy()
        ids[place], logprobs[place] = (part.cpu().numpy() for part in found)
    for name, part in zip(FILES, (ids, logprobs), strict=True):
        (folder / f"{name}.bin").write_bytes(part.tobytes())
    about = {"dtype": wide, "checksum": checksum(folder)}
    (folder / "meta.json").write_text(json.dumps(about), encoding="utf-8")


def read_folder(folder: Path, count: int, top_k: int) -> list[np.ndarray]:
    """Map ids and log-probabilities (count, top_k) from disk. Raises `UserError` if they are damaged."""
    try:
        about = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if about["checksum"] != checksum(folder):
            raise ValueError
        dtypes = (about["dtype"], "float16")
        return [np.memmap(folder / f"{name}.bin", dtype, mode="r", shape=(count, top_k))
                for name, dtype in zip(FILES, dtypes, strict=True)]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: damaged; delete this folder and run the command again") from None


def checksum(folder: Path) -> str:
    """Return a hash of the files of logits."""
    total = hashlib.sha256()
    for name in FILES:
        with open(folder / f"{name}.bin", "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
