"""The choice follows the measured time, a user's own choice stays, and measuring leaves no trace."""

import os
import subprocess
import sys

import pytest

from tests.train.tools import ROOT
from utils import waking


@pytest.mark.parametrize(
    "seconds, chosen",
    [
        (4e-6, {"OMP_WAIT_POLICY": "passive"}),
        (26e-6, {"GOMP_SPINCOUNT": "20000"}),  # where sleep cost 40 % of training speed
        (60e-6, {"GOMP_SPINCOUNT": "20000"}),
        (0.0, {"OMP_WAIT_POLICY": "passive"}),
    ],
)  # fmt: skip
def test_slow_waking_makes_threads_spin(monkeypatch, seconds, chosen):
    """4 and 60 microseconds: the two machines on which both settings were measured."""
    monkeypatch.setattr(waking, "wake_seconds", lambda: seconds)
    environment = {"PATH": "x"}
    waking.choose_waiting(environment)
    assert environment == {"PATH": "x"} | chosen


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_users_choice_stays(monkeypatch, name):
    monkeypatch.setattr(waking, "wake_seconds", lambda: pytest.fail("nothing to measure"))
    environment = {name: "active"}
    waking.choose_waiting(environment)
    assert environment == {name: "active"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be bound on this system")
def test_measuring_leaves_no_trace(monkeypatch):
    """Cores, threads and open files are as before; one core alone gives 0, as nobody can be woken there."""
    cores, files = os.sched_getaffinity(0), len(os.listdir("/proc/self/fd"))
    seconds = waking.wake_seconds()
    assert os.sched_getaffinity(0) == cores and len(os.listdir("/proc/self/fd")) == files
    assert 0 < seconds < 1 if len(cores) > 1 else seconds == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert waking.wake_seconds() == 0


def test_it_is_decided_before_pytorch_is_loaded():
    """The OpenMP library reads the variables when PyTorch loads it."""
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    code = f"import sys, os, utils; print('torch' in sys.modules, len({names} & {{*os.environ}}))"
    clean = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "1"], done.stdout + done.stderr
