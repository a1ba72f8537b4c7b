"""The rules of the house, read from every file: imports point down, nothing runs code from strangers."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # own folder and the floors below; floor 4 first
    "train": {"train", "inference", "model", "modules", "load_data", "config", "utils"},
    "inference": {"inference", "model", "modules", "load_data", "config", "utils"},
    "model": {"model", "modules", "load_data", "config", "utils"},
    "modules": {"modules", "config", "utils"},
    "load_data": {"load_data", "config", "utils"},
    "config": {"config", "utils"},
    "utils": {"config", "utils"},
}
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
IDS = [path.relative_to(ROOT).as_posix() for path in FILES]


def bootstrap(path):
    """The line that puts the repository root first on sys.path, for a script at `path`."""
    up = len(path.relative_to(ROOT).parts) - 1
    return (
        f"import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[{up}]))"
        "  # repository root"
    )



def parse(path):
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text, str(path))


def imports(tree):
    """Every package that a file imports, anywhere in it: (name of the top package, line)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; say the folder"
            yield node.module.split(".")[0], node.lineno


def called(node):
    """The dotted name of a call: torch.load, eval, ..."""
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join(reversed([*parts, target.id])) if isinstance(target, ast.Name) else ""


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path):
    folder = path.relative_to(ROOT).parts[0]
    _, tree = parse(path)
    for name, line in imports(tree):
        if name in MAY_IMPORT:
            assert name in MAY_IMPORT[folder], f"{path}:{line}: {folder}/ may not import {name}/"
        elif folder == "modules":
            assert name == "torch" or name in sys.stdlib_module_names, (
                f"{path}:{line}: modules/ imports {name}"
            )
        assert name not in ("tests", "peft", "trl"), f"{path}:{line}: {name} is for tests only"
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "transformers" not in {name for node in top for name, _ in imports(node)}, (
        f"{path}: only a comparison inside a function may need transformers"
    )


def test_the_check_above_can_fail():
    """The walker sees imports at any depth and in every spelling."""
    tree = ast.parse(
        "def f():\n    if x:\n        from train.engine.trainer import run\nimport model.tinyseek as t\n"
        "import os.path"
    )
    assert {name for name, _ in imports(tree)} == {"train", "model", "os"}
    with pytest.raises(AssertionError):
        list(imports(ast.parse("from . import rope")))
    assert called(ast.parse("torch.load(f)").body[0].value) == "torch.load"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_runs_code_from_data(path):
    _, tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, where = called(node), f"{path}:{node.lineno}"
            assert name not in ("eval", "exec", "compile", "__import__", "os.system"), f"{where}: {name}"
            assert not name.startswith(("pickle.load", "marshal.load", "dill.", "joblib.load")), (
                f"{where}: {name}"
            )
            if name == "torch.load":
                safe = [
                    k
                    for k in node.keywords
                    if k.arg == "weights_only" and getattr(k.value, "value", 0) is True
                ]
                assert safe, f"{where}: torch.load without weights_only=True"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle"):
                    assert getattr(keyword.value, "value", True) is False, f"{where}: {keyword.arg}"


@pytest.mark.parametrize("path", FILES + TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_and_letters(path):
    """At most 110 columns, no tabs, no emoji, one newline at the end."""
    text, _ = parse(path)
    long = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 110 and line != bootstrap(path)]
    assert not long, f"{path}: lines {long} are longer than 110 columns"
    assert "\t" not in text and "\r" not in text
    emoji = [letter for letter in text if ord(letter) >= 0x1F000 or 0x2600 <= ord(letter) < 0x27C0]
    assert path in TESTS or not emoji  # a test may need one as a hard case
    assert not text or text.endswith("\n") and not text.endswith("\n\n")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_file_says_what_it_is(path):
    _, tree = parse(path)
    assert ast.get_docstring(tree), f"{path} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_scripts_start_anywhere(path):
    """A file that can be run has the one line that puts the repository first on sys.path, before all others.

    modules/ is run as `python -m modules.name` from the repository, and needs none."""
    text, tree = parse(path)
    runs = 'if __name__ == "__main__"' in text
    if path.relative_to(ROOT).parts[0] == "modules" or not runs:
        assert "sys.path" not in text
        return
    first = tree.body[1]  # after the docstring
    assert text.splitlines()[first.lineno - 1] == bootstrap(path), f"{path}:{first.lineno}"
    assert text.count("sys.path") == 1


def test_every_folder_is_a_package():
    for path in FILES:
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"
    for path in TESTS:
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"
