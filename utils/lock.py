"""A lock on a folder, held by the operating system: it ends with its process, however that ends."""

import os
from pathlib import Path

from utils.errors import UserError

if os.name == "nt":
    import msvcrt
else:
    import fcntl


class FolderLock:
    """Holds `folder/.lock` from construction to `release()`. Raises `UserError` naming another holder."""

    def __init__(self, folder: Path, owner: str):
        self.path = Path(folder) / ".lock"
        words = f"{owner}, process {os.getpid()}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                self.file = open(self.path, "a+", encoding="utf-8")
                self.take()
                # The last holder may have removed the file between our opening and locking it.
                if self.path.exists() and os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                    break
                self.file.close()
            self.file.truncate(0)
            self.file.write(words)
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None

    def take(self) -> None:
        """Lock the open file, or raise `UserError`."""
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
                f"{self.path.parent} is in use by another run ({holder}): wait for it, or write elsewhere "
                "with --out DIR"
            ) from None

    def release(self) -> None:
        """Remove the file and give the lock up."""
        if not self.file.closed:
            if os.name != "nt":
                self.path.unlink(missing_ok=True)  # while still locked
            self.file.close()
