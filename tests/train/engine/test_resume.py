"""Kills and signals to the real script, from outside. The engine's own part is in `test_trainer.py`."""

import signal
import time

import pytest

from tests.train.engine.kill_and_resume import KINDS, campaign, result, start_forked, to_the_end, wait_for
from tests.train.tools import same_bits


@pytest.mark.slow
def test_kills_and_signals_leave_no_trace(tmp_path):
    """A few of what `python tests/train/engine/kill_and_resume.py --runs 20` does many times: pre-training
    and LoRA, killed at another moment every time. Then a run stopped by Ctrl-C and by SIGTERM, and finished,
    against the one of these that was not stopped."""
    line = campaign(runs=2, kills=1, seed=len(KINDS) * (time.time_ns() % 10**6), folder=tmp_path,
                    start=start_forked)  # fmt: skip
    assert "2 runs killed 2 times" in line
    out = tmp_path / "out"
    log = out / "pre_train" / "log.txt"
    for number in (signal.SIGINT, signal.SIGTERM):
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        process = start_forked(out, tmp_path, "muon")
        wait_for(process, lambda lines=lines: log.exists() and log.read_bytes().count(b"\n") > lines + 2, 60)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output + errors
        assert "Traceback" not in errors and output.count(f"stopped by {number.name} at step ") == 1
    to_the_end(start_forked(out, tmp_path, "muon"))
    tensors, rows = result(out, "muon")
    expected, expected_rows = result(tmp_path / "muon", "muon")
    assert same_bits(tensors, expected) and rows == expected_rows
