"""The reading command: which of our files a script calls into, and how long they are."""

import subprocess
import sys

import pytest

from tests.train.tools import ROOT
from train.lab import reading

FILES = {
    "toy.py": "import called, imported, threaded\nimport threading\n\n\ndef main():\n    called.act()\n"
              "    thread = threading.Thread(target=threaded.act)\n    thread.start(), thread.join()\n\n\n"
              'if __name__ == "__main__":\n    main()\n    raise SystemExit(0)\n',
    "called.py": "import json\n\n\ndef act():\n    return json.dumps([1])\n",
    "threaded.py": "def act():\n    return 1\n",
    # of what runs on import, nothing counts: statements, class bodies, comprehensions, generated methods
    "imported.py": "from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n    x: int = 0\n\n\n"
                   "NAMES = [name for name in 'abc']\nTOTAL = sum(1 for name in NAMES)\nPOINT = Point()\n\n\n"
                   "def never():\n    return 1\n",
    ".venv/lib.py": "",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("called", "imported", "threaded"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_files_whose_functions_are_called_are_counted(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reading.py"])
    counts = reading.lines_called(str(folder / "toy.py"), ["--flag"], folder)
    assert list(counts.items()) == [("toy.py", 13), ("called.py", 5), ("threaded.py", 2)]
    assert sys.argv == [str(folder / "toy.py"), "--flag"] and sys.getprofile() is None
    assert list(reading.lines_called(str(folder / "toy.py"), [], folder / "other")) == []
    monkeypatch.setattr(sys, "argv", ["reading.py", str(folder / "toy.py")])
    reading.main()
    assert capsys.readouterr().out == "      0  lines in 0 files\n"  # none of it is below our root


def test_a_script_that_fails_fails_here_too(folder, monkeypatch):
    (folder / "toy.py").write_text("raise SystemExit(2)", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["reading.py"])
    with pytest.raises(SystemExit):
        reading.lines_called(str(folder / "toy.py"), [], folder)
    assert sys.getprofile() is None
    monkeypatch.setattr(sys, "argv", ["reading.py", str(folder / "none.py")])
    with pytest.raises(SystemExit, match="2"):
        reading.main()


def test_functions_called_by_an_import_of_the_script_count(tmp_path):
    """`import utils` measures the machine, which a test in a process that has imported it cannot see."""
    (tmp_path / "script.py").write_text("import utils\n", encoding="utf-8")
    command = [sys.executable, ROOT / "train" / "lab" / "reading.py", tmp_path / "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[0].endswith("  utils/cores.py") and "in 1 files" in done.stdout
