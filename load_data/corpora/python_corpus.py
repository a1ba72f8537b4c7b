"""The embedded corpus: the standard library of the running Python, as source and as docstrings.

Nothing is downloaded, imported or executed: files are read, and `ast` finds the docstrings. Files are split
into training and held-out ones before any text is taken from them, so no docstring of a held-out file is
ever trained on. A training file that contains a reserved sum (`reserved.py`) is left out.
The text depends on the Python version; `summary` and `digest` identify it.
"""

import ast
import hashlib
import inspect
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from load_data.corpora.reserved import holds_reserved_sum, unit_hash
from utils.errors import UserError

# Folder names, at any depth: tests, installed packages, and folders without source.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload"}
# Generated tables, and (encodings) a hundred copies of one template: data written as source code.
SKIPPED_TABLES = ("encodings/", "pydoc_data/", "msilib/", "config-", "_sysconfigdata", "re/_casefix.py")
SKIPPED_TABLES += ("html/entities.py", "stringprep.py")
SHORTEST_DOCSTRING = 20  # characters; shorter ones carry no information
LONG_LINE = 25  # characters; a shorter line in two files is chance, not a copy


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the library's folder, with forward slashes, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class PythonCorpus:
    """The standard library, split by file."""

    train: list[SourceFile]
    val: list[SourceFile]

    @property
    def files(self) -> list[SourceFile]:
        """All files, sorted by name."""
        return sorted(self.train + self.val, key=lambda file: file.name)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the names and contents of the files, not their location."""
        total = hashlib.sha256()
        for file in self.files:
            content = hashlib.sha256(file.text.encode("utf-8")).hexdigest()
            total.update(f"{file.name} {content}\n".encode())
        return total.hexdigest()[:16]

    @property
    def repeated_share(self) -> float:
        """Share of held-out characters in long lines that also occur, verbatim, in a training file."""
        known = {line.strip() for file in self.train for line in file.text.splitlines()}
        lines = [line for file in self.val for line in file.text.splitlines(keepends=True)]
        copied = [line for line in lines if len(line.strip()) >= LONG_LINE and line.strip() in known]
        return sum(map(len, copied)) / max(1, sum(map(len, lines)))

    @property
    def summary(self) -> str:
        """One line: Python version, files, bytes, digest, and how much of the held-out text is copied."""
        size = sum(len(file.text.encode("utf-8")) for file in self.files)
        return (
            f"standard library of Python {platform.python_version()}: {len(self.train)} files to train on, "
            f"{len(self.val)} held out, {size:,} bytes, file list {self.digest}; {self.repeated_share:.1%} "
            "of the held-out text is lines that also occur in training files"
        )


def read_python_corpus(val_fraction: float, root: Path | None = None) -> PythonCorpus:
    """Read the standard library below `root` (default: the interpreter's own), split by a hash of file names.

    Raises `UserError` if there is no source: minimal installations contain bytecode only.
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
            continue  # unreadable, or in another encoding: a handful at most
        if not text.strip():
            continue
        if unit_hash(name) < val_fraction:
            corpus.val.append(SourceFile(name, text))
        elif not holds_reserved_sum(text):
            corpus.train.append(SourceFile(name, text))
    if not corpus.files:
        raise UserError(
            f"--data python: no Python source files in {root}; use a full Python installation, or train on "
            "your own text with --data FILE"
        )
    return corpus


def docstring_documents(file: SourceFile) -> Iterator[str]:
    """Yield one text for each docstring of `file`: a heading, then the docstring.

    The heading is, for example, `textwrap.dedent(text)`, `class queue.Queue` or `module json.decoder`.
    """
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return  # a template rather than a module
    module = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    yield from described(tree, f"module {module}")
    yield from described_inside(tree, module)


def described_inside(parent: ast.AST, prefix: str) -> Iterator[str]:
    """Yield the documents of all functions and classes in `parent`, whose dotted name is `prefix`."""
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
    """Yield `heading` and the docstring of `node`, if it has one of useful length."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring and len(docstring.strip()) >= SHORTEST_DOCSTRING:
        yield f"{heading}\n{inspect.cleandoc(docstring).strip()}\n"
