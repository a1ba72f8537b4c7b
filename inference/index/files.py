"""The files of a folder that are text, and the reasons why others are left out.

Links are never followed, so nothing outside the folder is read. A file is opened only if its name promises
text, and it is text if it has no NUL byte. What is not UTF-8 is read as Latin-1, in which every byte is a
character.
"""

import os
import stat
from collections import Counter
from pathlib import Path

LARGEST = 2**20  # bytes
CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".java", ".js", ".jsx", ".kt",
        ".lua", ".php", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx")  # fmt: skip
PROSE = (".md", ".rst", ".txt", ".tex", ".html", ".css", ".toml", ".cfg", ".ini", ".yaml", ".yml")
LARGEST_BY_KIND = dict.fromkeys(CODE + PROSE, LARGEST) | {".json": 2**16}  # a larger one is data
BUILT = {"__pycache__", "node_modules", "site-packages", "build", "dist", "out", "target"}  # by programs


def find_files(folder: Path) -> tuple[dict[str, os.stat_result], Counter]:
    """Return the files to read, {path within `folder`: its state} in sorted order, and how many files and
    folders were left out for each reason. Paths have forward slashes on every system."""
    found, skipped = {}, Counter()
    for here, folders, names in os.walk(folder, onerror=lambda error: skipped.update(["unreadable folders"])):
        reasons = {name: why_not_enter(Path(here, name)) for name in folders}
        skipped.update(reason for reason in reasons.values() if reason)
        folders[:] = [name for name in folders if not reasons[name]]
        for name in names:
            path = Path(here, name)
            try:
                state = path.lstat()
            except OSError:  # deleted since it was listed
                continue
            if reason := why_not_open(name, state):
                skipped[reason] += 1
            else:
                found[path.relative_to(folder).as_posix()] = state
    return dict(sorted(found.items())), skipped


def why_not_enter(path: Path) -> str | None:
    """Return the reason for leaving a folder out, or None."""
    if path.is_symlink():
        return "links"
    if path.name.startswith("."):
        return "hidden folders"
    if (path / "pyvenv.cfg").exists():
        return "virtual environments"
    return "built folders" if path.name in BUILT or path.name.endswith(".egg-info") else None


def why_not_open(name: str, state: os.stat_result) -> str | None:
    """Return the reason for leaving a file out without opening it, or None."""
    largest = LARGEST_BY_KIND.get(Path(name).suffix.lower())
    if stat.S_ISLNK(state.st_mode):
        return "links"
    if name.startswith("."):
        return "hidden files"
    if largest is None or not stat.S_ISREG(state.st_mode):  # a pipe or a device may never end
        return "files of other kinds"
    return "large files" if state.st_size > largest else None


def read_file(path: Path) -> bytes | None:
    """Return the first `LARGEST` bytes of a file, or None if it cannot be read, as after its deletion."""
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST)
    except OSError:
        return None


def text_of(data: bytes) -> str | None:
    """Return the text in the bytes of a file, its lines ending in newlines; None for a binary file."""
    if b"\0" in data:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")
