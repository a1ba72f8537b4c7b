"""Every file of modules/ is a lesson: it runs by itself, is quick, shows something, explains itself."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "modules").rglob("*.py") if path.name != "__init__.py")
NAMES = [".".join(path.relative_to(ROOT / "modules").with_suffix("").parts) for path in FILES]


def definitions(tree):
    """Every public class and function of a file, methods of public classes included, with a name to show."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("name", NAMES)
def test_the_lesson_runs(name):
    """As `__main__`, in less than five seconds, printing three lines or more of at most 120 columns."""
    screen, start, state = io.StringIO(), time.perf_counter(), torch.get_rng_state()
    saved = sys.modules.pop(f"modules.{name}", None)  # so that it is run, not found
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            runpy.run_module(f"modules.{name}", run_name="__main__")
    finally:
        if saved is not None:
            sys.modules[f"modules.{name}"] = saved
        torch.set_rng_state(state)
    assert time.perf_counter() - start < 5
    lines = screen.getvalue().rstrip().split("\n")
    assert len(lines) >= 3 and max(map(len, lines)) <= 120, lines
    assert not any(word in screen.getvalue() for word in ("Warning", "Traceback", "nan")), screen.getvalue()


@pytest.mark.slow
def test_as_a_reader_would_start_it():
    """`python -m modules.rope` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "modules.rope"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "RoPE" in done.stdout and not done.stderr


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_short_and_explained(path):
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    assert len(lines) <= 210, f"{len(lines)} lines: a file of modules/ holds one idea in about 200"
    assert len(ast.get_docstring(tree) or "") > 200, (
        "the head of the file says what it is, the formula, the shapes"
    )
    bare = [name for name, node in definitions(tree) if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {bare}"
    lesson = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "lesson")
    first = lesson.body[1].lineno  # after the docstring
    code = [
        line
        for line in lines[first - 1 : lesson.end_lineno]
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) <= 25, f"{len(code)} lines of code in lesson()"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_happens_at_import(name):
    """A module only defines: importing it prints nothing and draws no random number."""
    state, screen = torch.get_rng_state(), io.StringIO()
    with contextlib.redirect_stdout(screen):
        module = importlib.import_module(f"modules.{name}")
        source = inspect.getsource(module)
    assert not screen.getvalue() and torch.equal(state, torch.get_rng_state())
    assert source.rstrip().endswith('if __name__ == "__main__":\n    lesson()')
