"""The log of a run: one line of `key=value` pairs per logged step. Read it, grep it, plot it.

    step=10  tokens=5120  epoch=0.01  loss=5.2318  ppl=187.12  lr=0.001  tok_s=10432.5

Numbers are written with six significant digits: enough to tell two runs apart, short enough to read, and the
same text for the same number, so that the log of a resumed run can be compared with that of an uninterrupted
one.
"""

from pathlib import Path

from utils.errors import UserError


class RunLog:
    """Appends lines to a log file. `resume_at` is the `position` that a checkpoint stored; None starts over.

    A killed run has usually logged steps after its last checkpoint. The resumed run takes these steps again
    and writes their lines again, so the file is first truncated to `resume_at`.
    """

    def __init__(self, path: str | Path, resume_at: int | None = None):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # bytes, so that positions and line ends are the same on every system
            self.file = open(self.path, "ab+")  # noqa: SIM115  stays open as long as the run
        except OSError as error:
            raise UserError(f"cannot write the log {self.path}: {error.strerror}") from None
        self.file.seek(0)
        kept = self.file.read(resume_at or 0)
        # after a power cut the log may be shorter than the checkpoint says: go to its last whole line
        self.file.truncate(kept.rfind(b"\n") + 1)
        self.file.seek(0, 2)

    @property
    def position(self) -> int:
        """Bytes written so far, for the checkpoint; it is passed back as `resume_at`."""
        return self.file.tell()

    def write(self, values: dict[str, int | float]) -> None:
        """Append one line and flush it."""
        try:
            self.file.write(format_line(values).encode("utf-8") + b"\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"could not write {self.path}: {error.strerror}; free some space and continue with --resume"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def format_line(values: dict[str, int | float]) -> str:
    """Format `key=value` pairs, two spaces between: integers in full, other numbers with six digits."""
    texts = {key: str(value) if isinstance(value, int) else f"{value:.6g}" for key, value in values.items()}
    return "  ".join(f"{key}={text}" for key, text in texts.items())


def parse_line(line: str) -> dict[str, int | float]:
    """Return the numbers of one line. Raises `ValueError` if it has another form."""
    pairs = [pair.split("=") for pair in line.split()]
    return {key: int(text) if text.lstrip("-").isdecimal() else float(text) for key, text in pairs}


def read_log(path: str | Path) -> list[dict[str, int | float]]:
    """Return all lines of a log as dictionaries; a last line that a crash truncated is left out.

    Raises `UserError` if the file is missing, or if another line has another form.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the log ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last line break: nothing, or half a line
        try:
            rows.append(parse_line(line))
        except ValueError:
            if number < len(lines) - 1:
                raise UserError(f"{path}, line {number}: no key=value pairs: {line[:60]!r}") from None
    return rows
