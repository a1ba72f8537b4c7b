"""`make train` trains once, and the second time says what to do next instead of failing."""

import shutil
import subprocess

import pytest

from tests.train.tools import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_second_make_train_says_what_to_do(tmp_path):
    def make(*words):
        command = ["make", "-n", "-f", str(ROOT / "Makefile"), "train", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "requirements.txt").touch()
    assert "train/pre_train.py" in make()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "TinySeek_Pre_final.pkl").touch()
    said = make()
    assert "make chat" in said and "ARGS=--resume" in said and "pre_train" not in said
    assert "train/pre_train.py --resume" in make("ARGS=--resume")
