"""The embedded corpus: the standard library of the Python that runs this, as source and as docstrings.

Nothing is downloaded, nothing imported and nothing executed: files are read, and `ast` finds the docstrings.
Files are divided into training and validation before anything is taken from them, so that no docstring of a
held-out file is ever trained on. The text depends on the Python version; `summary` and `digest` say which
text it was.
"""

import ast
import hashlib
import inspect
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from load_data.corpora.reserved import unit_hash
from utils.errors import UserError

# Folders by name, at any depth: tests, installed packages, and what is not source.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "__pycache__",
}
# Tables written by programs, and (encodings) a hundred copies of one template: data in the clothes of source.
SKIPPED_TABLES = (
    "encodings/",
    "pydoc_data/",
    "msilib/",
    "config-",
    "_sysconfigdata",
    "re/_casefix.py",
    "html/entities.py",
    "stringprep.py",
)
SHORTEST_DOCSTRING = 20  # characters; shorter ones say nothing


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the library's folder, with forward slashes, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class PythonCorpus:
    """The standard library, divided by file."""

    train: list[SourceFile]
    val: list[SourceFile]

    @property
    def files(self) -> list[SourceFile]:
        """All files, in the order of their names."""
        return sorted(self.train + self.val, key=lambda file: file.name)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the files: their names and contents, not where they lie."""
        total = hashlib.sha256()
        for file in self.files:
            content = hashlib.sha256(file.text.encode("utf-8")).hexdigest()
            total.update(f"{file.name} {content}\n".encode())
        return total.hexdigest()[:16]

    @property
    def summary(self) -> str:
        """One line: Python version, files, bytes, digest."""
        size = sum(len(file.text.encode("utf-8")) for file in self.files)
        return (
            f"standard library of Python {platform.python_version()}: {len(self.train)} files to train on, "
            f"{len(self.val)} held out, {size:,} bytes, file list {self.digest}"
        )


def read_python_corpus(val_fraction: float, root: Path | None = None) -> PythonCorpus:
    """The standard library below `root` (default: the interpreter's own), divided by a hash of file names.

    Raises `UserError` where the library is not there as source: minimal installations ship bytecode only.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    corpus = PythonCorpus([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) or name.startswith(SKIPPED_TABLES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # unreadable, or in an encoding of its own: a handful at most
        if text.strip():
            (corpus.val if unit_hash(name) < val_fraction else corpus.train).append(SourceFile(name, text))
    if not corpus.files:
        raise UserError(
            f"--data python: no Python source files in {root}; use a full Python installation, or give your "
            "own text with --data FILE"
        )
    return corpus


def docstring_documents(file: SourceFile) -> Iterator[str]:
    """One text for each docstring of `file`: a line that says what is described, then the docstring.

    The line is `textwrap.dedent(text)`, for example, or `class queue.Queue`, or `module json.decoder`.
    """
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return  # a template rather than a module
    module = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    yield from described(tree, f"module {module}")
    yield from described_inside(tree, module)


def described_inside(parent: ast.AST, prefix: str) -> Iterator[str]:
    """The documents of all functions and classes inside `parent`, whose dotted name is `prefix`."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield from described(node, f"class {prefix}.{node.name}")
            yield from described_inside(node, f"{prefix}.{node.name}")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from described(node, f"{prefix}.{node.name}({ast.unparse(node.args)})")
            yield from described_inside(node, f"{prefix}.{node.name}")
        elif not isinstance(node, ast.expr):
            yield from described_inside(node, prefix)  # definitions under `if` and `try`


def described(node: ast.AST, heading: str) -> Iterator[str]:
    """`heading` and the docstring of `node`, if it has one worth reading."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring and len(docstring.strip()) >= SHORTEST_DOCSTRING:
        yield f"{heading}\n{inspect.cleandoc(docstring).strip()}\n"
