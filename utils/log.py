"""The log of a run: one line of `key=value` pairs per logged step. Read it, grep it, plot it.

    step=10  tokens=5120  epoch=0.01  loss=5.2318  ppl=187.12  lr=0.001  tok_s=10432.5

Numbers are written with six significant digits: enough to tell two runs apart, short enough to read, and the
same text for the same number, so that the log of a resumed run can be compared with that of an unbroken one.
"""

from pathlib import Path

from utils.errors import UserError

# the keys that measure the machine and not the learning: they differ from run to run
TIMING_KEYS = frozenset({"tok_s", "data_ms", "step_ms", "eval_ms", "elapsed_s", "eval_s", "save_s", "mfu"})


class RunLog:
    """Appends lines to a log file. `resume_at` is the `position` that a checkpoint stored; None starts anew.

    A run that is killed has usually logged steps after its last checkpoint. The resumed run takes these steps
    again and writes their lines again, so everything after `resume_at` is cut off first.
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
        # after a power cut the log may be shorter than the checkpoint says: go on after its last whole line
        self.file.truncate(kept.rfind(b"\n") + 1)
        self.file.seek(0, 2)

    @property
    def position(self) -> int:
        """Bytes written so far: goes into the checkpoint, and comes back as `resume_at`."""
        return self.file.tell()

    def write(self, values: dict[str, int | float]) -> str:
        """Append one line and push it out to the file; returns the line."""
        line = format_line(values)
        try:
            self.file.write(line.encode("utf-8") + b"\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"could not write {self.path}: {error.strerror}; free some space and continue with --resume"
            ) from None
        return line

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def format_line(values: dict[str, int | float]) -> str:
    """`key=value` pairs, two spaces between: integers in full, other numbers with six significant digits."""
    texts = {key: str(value) if isinstance(value, int) else f"{value:.6g}" for key, value in values.items()}
    return "  ".join(f"{key}={text}" for key, text in texts.items())


def parse_line(line: str) -> dict[str, int | float]:
    """The numbers of one line. Raises `ValueError` if it is no such line."""
    values = {}
    for pair in line.split():
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise ValueError(pair)
        try:
            values[key] = int(text)
        except ValueError:
            values[key] = float(text)
    return values


def read_log(path: str | Path) -> list[dict[str, int | float]]:
    """All lines of a log as dictionaries; a last line that a crash cut short is left out.

    Raises `UserError` if the file is missing or another line is not `key=value` pairs.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the log ({error.strerror})") from None
    rows = []
    complete = lines[:-1]  # what follows the last line end is empty, or half a line
    for number, line in enumerate(complete, start=1):
        try:
            rows.append(parse_line(line))
        except ValueError:
            if number < len(complete):
                raise UserError(f"{path}, line {number}: no key=value pairs: {line[:60]!r}") from None
    return rows


def without_timing(rows: list[dict[str, int | float]]) -> list[dict[str, int | float]]:
    """The same rows less `TIMING_KEYS`: what must be equal in two runs of the same command."""
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows]
