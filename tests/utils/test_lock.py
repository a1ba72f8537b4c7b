"""A lock on a folder, against another process that holds it and is killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.lock import FolderLock

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from utils.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "pre_train")
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path / "new"), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another run \(pre_train, process {process.pid}\)"):
            FolderLock(tmp_path / "new", "other")
        process.kill()
        process.wait()
    lock = FolderLock(tmp_path / "new", "other")
    lock.release()
    lock.release()
    FolderLock(tmp_path / "new", "third").release()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file"):
        FolderLock(tmp_path / "file", "x")
