"""The rules of the house, read from every file: layout, imports, text, and no code from strangers is run.

Each rule is a function from a tree of files, {path: text}, to complaints. `test_the_house_keeps_its_rules`
applies it to this repository, and `test_each_rule_can_fail` to small trees that break it.
"""

import ast
import re
import sys
from functools import cache
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
WITHIN_TRAIN = {"scripts": {"engine", "proof"}, "lab": {"lab", "engine", "proof"},
                "engine": {"engine", "proof"}, "proof": {"proof"}}  # fmt: skip
TORCH = {"torch", "triton"}  # PyTorch for CUDA brings Triton along
LONGEST = {"modules": 200, "model": 200}  # lines of a file; 300 elsewhere
QUESTIONS = ("what ", "how ", "which ", "who ", "where ", "whether ", "why ", "when ")


@cache
def parse(text):
    return ast.parse(text)


def sources(tree):
    """The files of the tree outside tests/, each with its syntax tree."""
    return [(path, parse(text)) for path, text in tree.items() if path.partition("/")[0] in MAY_IMPORT]


def bootstrap(path):
    """The line that puts the repository root first on sys.path, for a script at `path`."""
    root = f"str(pathlib.Path(__file__).resolve().parents[{path.count('/')}])"
    return f"import sys, pathlib; sys.path.insert(0, {root})  # repository root"


def imports(node, lessons=True):
    """Every module that is imported at any depth, and names taken from it: (dotted name, line). With
    `lessons=False`, imports within functions named `lesson` are left out."""
    if not lessons and isinstance(node, ast.FunctionDef) and node.name == "lesson":
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, lessons)


def called(node):
    """The dotted name of a call: torch.load, eval, ..."""
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join(reversed([*parts, target.id])) if isinstance(target, ast.Name) else ""


# ----------------------------------------------------------------------------------------------------- layout


def lengths(tree):
    for path, _ in sources(tree):
        lines, longest = len(tree[path].splitlines()), LONGEST.get(path.partition("/")[0], 300)
        if lines > longest:
            yield f"{path}: {lines} lines, at most {longest}: can one idea have a file of its own?"


def top_of_train(tree):
    """What can be run: the stages, and chapter one."""
    for path, _ in sources(tree):
        folder, _, name = path.rpartition("/")
        others = ("minimal.py", "extend_context.py", "__init__.py")
        if folder == "train" and not name.endswith("_train.py") and name not in others:
            yield f"{path}: the top level of train/ holds stage scripts and minimal.py only"


def packages(tree):
    for path in tree:
        if "/" in path and f"{path.rpartition('/')[0]}/__init__.py" not in tree:
            yield f"{path}: its folder has no __init__.py"


def scripts_start_anywhere(tree):
    """A file that can be run has the one line that puts the repository first on sys.path, before all others.
    modules/ is run as `python -m modules.name` from the repository, and needs none."""
    for path, syntax in sources(tree):
        text = tree[path]
        if path.startswith("modules/") or 'if __name__ == "__main__"' not in text:
            if "sys.path" in text:
                yield f"{path}: touches sys.path, but is no script"
        elif text.splitlines()[syntax.body[1].lineno - 1] != bootstrap(path) or text.count("sys.path") != 1:
            yield f"{path}: the first line after the docstring must be {bootstrap(path)}"


# ---------------------------------------------------------------------------------------------------- imports


def imports_point_down(tree):
    for path, syntax in sources(tree):
        folder = path.partition("/")[0]
        for name, line in imports(syntax):
            top, where = name.split(".")[0], f"{path}:{line}"
            if not top:
                yield f"{where}: relative import; say the folder"
            elif top in MAY_IMPORT and top not in MAY_IMPORT[folder]:
                yield f"{where}: {folder}/ may not import {top}/"
            elif top == folder == "train" and room(name) not in WITHIN_TRAIN[room(path.replace("/", "."))]:
                yield f"{where}: {path} may not import {name}"
            elif folder == "modules" and top not in {*MAY_IMPORT, *TORCH, *sys.stdlib_module_names}:
                yield f"{where}: modules/ imports {name}"
            if top in ("tests", "peft", "trl"):
                yield f"{where}: {top} is for tests only"
        for node in syntax.body:
            plain = isinstance(node, (ast.Import, ast.ImportFrom))
            if plain and any(name.split(".")[0] == "transformers" for name, _ in imports(node)):
                yield f"{path}:{node.lineno}: only a comparison inside a function may need transformers"


def room(name):
    """`train.engine.trainer` -> `engine`; what is not in a room of train/ is a script."""
    part = name.split(".")[1]
    return part if part in WITHIN_TRAIN else "scripts"


def no_cycles(tree):
    """Files that import each other cannot be read one after the other. Lessons may look upwards."""
    graph = {}
    for path, syntax in sources(tree):
        found = set()
        for name, _ in imports(syntax, lessons=False):
            base = name.replace(".", "/")
            shorter = base.rpartition("/")[0]
            options = (f"{base}.py", f"{base}/__init__.py", f"{shorter}.py", f"{shorter}/__init__.py")
            found |= {next((option for option in options if option in tree), path)}
        graph[path] = found - {path}
    far = {path: below(path, graph) for path in graph}
    loops = {tuple(sorted(p for p in far[path] if path in far[p])) for path in graph if path in far[path]}
    return [f"these files import each other: {', '.join(loop)}" for loop in sorted(loops)]


def below(path, graph):
    """All files that `path` imports, directly or not."""
    seen, waiting = set(), [path]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


# ------------------------------------------------------------------------------------------------------- text


def docstrings(tree):
    """Every file, and every public class and function, says what it is or does: verb or noun first."""
    for path, syntax in sources(tree):
        public = [node for node in syntax.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
        public = [node for node in public if not node.name.startswith("_")]
        for node in (syntax, *public):
            if not ast.get_docstring(node):
                yield f"{path}: {getattr(node, 'name', 'the file')} has no docstring"
        for node in ast.walk(syntax):
            named = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if named and (ast.get_docstring(node) or "").lower().startswith(QUESTIONS):
                yield f"{path}: the docstring of {getattr(node, 'name', 'the file')} begins with a question"


def lines_and_letters(tree):
    """At most 110 columns, no tabs, no emoji (but as a hard case of a test), one newline at the end."""
    for path, text in tree.items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > 110 and line != bootstrap(path):
                yield f"{path}:{number}: longer than 110 columns"
        if "\t" in text or "\r" in text or text and (not text.endswith("\n") or text.endswith("\n\n")):
            yield f"{path}: a tab, a carriage return, or not one newline at the end"
        if not path.startswith("tests/") and any(
            ord(letter) >= 0x1F000 or 0x2600 <= ord(letter) < 0x27C0 for letter in text
        ):
            yield f"{path}: an emoji"


def nothing_runs_code_from_data(tree):
    for path, syntax in sources(tree):
        for node in ast.walk(syntax):
            if not isinstance(node, ast.Call):
                continue
            name, words = called(node), {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "os.system"):
                yield f"{path}:{node.lineno}: {name}"
            if name.startswith(("pickle.load", "marshal.load", "dill.", "joblib.load")):
                yield f"{path}:{node.lineno}: {name}"
            if name == "torch.load" and words.get("weights_only") is not True:
                yield f"{path}:{node.lineno}: torch.load without weights_only=True"
            for word in ("shell", "trust_remote_code", "allow_pickle"):
                if words.get(word, False) is not False:
                    yield f"{path}:{node.lineno}: {word}"


# ------------------------------------------------------------------------------------------------------ tests

FILES = [path for folder in (*MAY_IMPORT, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
HOUSE = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
DOC = '"""Words."""\n'
BROKEN = {  # rule -> trees that break it, and the one complaint of each
    lengths: [({"modules/a.py": "\n" * 201}, "201 lines"), ({"utils/a.py": "\n" * 301}, "301 lines")],
    top_of_train: [({"train/tools.py": "", "train/sft_train.py": "", "train/lab/a.py": ""}, "tools.py")],
    packages: [({"utils/a.py": ""}, "no __init__")],
    scripts_start_anywhere: [
        ({"train/a.py": DOC + 'if __name__ == "__main__":\n    x\n'}, r"the first line .*parents\[1\]"),
        ({"utils/a.py": DOC + "import sys\nsys.path.append('x')\n"}, "no script"),
    ],
    imports_point_down: [
        ({"utils/a.py": "def f():\n    if x:\n        from train.proof import t\n"}, "a.py:3: utils/"),
        ({"inference/a.py": "import train.proof as t\n"}, "inference/ may not import train/"),
        ({"load_data/a.py": "import modules.rope\n"}, "load_data/ may not import modules/"),
        ({"train/proof/a.py": "from train.engine import trainer\n"}, "may not import train.engine.trainer"),
        ({"train/engine/a.py": "import train.lab.ablate\n"}, "may not import train.lab.ablate"),
        ({"train/engine/a.py": "from train.pre_train import main\n"}, "may not import train.pre_train.main"),
        ({"train/lora_train.py": "from train.lab import ablate\n"}, "may not import train.lab.ablate"),
        ({"modules/a.py": "import torch, numpy\n"}, "modules/ imports numpy"),
        ({"modules/a.py": "from . import rope\n"}, "relative import"),
        ({"model/a.py": "def f():\n    import peft\n"}, "for tests only"),
        ({"model/a.py": "import transformers\n"}, "inside a function"),
    ],
    no_cycles: [
        ({"utils/a.py": "import utils.b\n", "utils/b.py": "def f():\n    from utils import a\n"}, "b.py"),
        ({"utils/a.py": "from utils.b import x\n", "utils/b.py": "from utils.c import x\n",
          "utils/c.py": "from utils.a import x\n", "utils/d.py": "import utils.a\n"},
         "a.py, utils/b.py, utils/c.py$"),
        ({"utils/__init__.py": "from utils.a import x\n", "utils/a.py": "from utils import y\n"}, "__init__"),
    ],
    docstrings: [
        ({"utils/a.py": "x = 1\n"}, "the file has no docstring"),
        ({"utils/a.py": DOC + "def f():\n    return 1\n"}, "f has no docstring"),
        ({"utils/a.py": '"""Where it is."""\n'}, "docstring of the file begins"),
        ({"utils/a.py": DOC + 'class A:\n    """A."""\n    def f():\n        """How so."""\n'}, "of f"),
    ],
    lines_and_letters: [
        ({"tests/a.py": "#" * 111 + "\n"}, "a.py:1: longer"), ({"tests/a.py": "x\n\n"}, "newline"),
        ({"utils/a.py": "\tx\n"}, "tab"), ({"utils/a.py": "# \U0001f600\n"}, "emoji"),
    ],
    nothing_runs_code_from_data: [
        ({"utils/a.py": text}, text.split("(")[0] if "=" not in text else r"load|shell")
        for text in ("eval('1')\n", "pickle.loads(x)\n", "torch.load(f)\n", "torch.load(f, weights_only=y)\n",
                     "run(x, shell=True)\n")
    ],
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
    complaints = list(rule(HOUSE))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_each_rule_can_fail(rule):
    for tree, words in BROKEN[rule]:
        (complaint,) = rule(tree)
        assert re.search(words, complaint), complaint


def test_what_the_rules_allow():
    """Lessons may look upwards within a floor, tests may be long, a comparison may need transformers."""
    tree = {
        "utils/__init__.py": "", "tests/__init__.py": "", "tests/a.py": "x\n" * 400,
        "utils/a.py": DOC + "from utils import b\n", "utils/b.py": "def lesson():\n    import utils.a\n",
    }  # fmt: skip
    for rule in (no_cycles, lengths, packages, imports_point_down):
        assert not list(rule(tree))
    assert not list(imports_point_down({"model/a.py": "def twin():\n    import transformers\n"}))
    assert len(HOUSE) > 150 and "train/engine/trainer.py" in HOUSE
