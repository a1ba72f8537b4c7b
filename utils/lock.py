"""A lock on a folder, held by the operating system: it ends with its process, however that ends."""

import os
from pathlib import Path

from utils.errors import UserError

if os.name == "nt":
    import msvcrt
else:
    import fcntl


class FolderLock:
    """Holds `folder/.lock` from construction to `release()`. Raises `UserError` naming another holder.

    The file itself stays: removing it would race with a run that has just opened it.
    """

    def __init__(self, folder: Path, owner: str):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = open(Path(folder) / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  open while held
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
        try:
            if os.name == "nt":
                self.file.seek(2**20)  # Windows locks also forbid reading, so lock beyond the text
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            holder = self.file.read() or "another process"
            self.file.close()
            raise UserError(
                f"{folder} is in use by another run ({holder}): wait for it, or write elsewhere with "
                "--out DIR"
            ) from None
        self.file.truncate(0)
        self.file.write(f"{owner}, process {os.getpid()}")
        self.file.flush()

    def release(self) -> None:
        """Release the lock."""
        self.file.close()
