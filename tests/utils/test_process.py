"""What a run sets for its whole process: how threads wait, and that freed memory stays."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from config.schema import RunConfig
from train.engine import machine as train_machine

ROOT = Path(__file__).resolve().parents[2]
FAULTS = """
import ctypes, resource, sys, utils, torch
from utils.device import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which one fault brings 512
if sys.argv[1:] and not keep_freed_memory():
    sys.exit("unable")

def faults(pieces):
    # As in a training step: large blocks of several sizes, taken and given back.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for n in pieces:
        torch.zeros(n * 2**18)  # n MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pieces = [40, 3, 70, 20, 33]
for _ in range(3):
    faults(pieces)
print(sum(faults(pieces) for _ in range(10)), 10 * sum(pieces) * 2**20 // resource.getpagesize())
"""


def run(script: str, *arguments: str, **environment) -> list[str]:
    """The words that it prints, in a process that our own settings do not reach."""
    ours = ("OMP_WAIT_POLICY", "GOMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    settings = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=settings | environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 36),
    reason="other C libraries have rules of their own, older ones keep smaller blocks only",
)
@pytest.mark.slow
def test_freed_memory_stays_with_the_process():
    """Counted by the system: pages that had to be cleared anew for blocks of a size used before."""
    (kept, pages), (returned, _) = (map(int, run(FAULTS, *words)) for words in (["keep"], []))
    assert kept < 0.1 * returned and returned > 0.2 * pages


def test_a_run_keeps_its_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(train_machine, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(train_machine, "set_threads", lambda: calls.append("threads"))
    train_machine.start_machine(RunConfig())
    assert sorted(calls) == ["kept", "threads"]
