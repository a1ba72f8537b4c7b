"""What a run sets for its whole process: how threads wait, and that freed memory stays."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, utils, torch
from utils.device import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()

def faults(pieces):
    # As in a training step: large blocks of several sizes, taken and given back.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for n in pieces:
        torch.zeros(n * 2**18)  # n MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pieces = [40, 3, 70, 20, 33]
for _ in range(3):
    faults(pieces)
print(sum(faults(pieces) for _ in range(10)), "of", 10 * sum(pieces) * 2**20 // 4096)
"""


def run(script: str, *arguments: str, **environment) -> list[str]:
    settings = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=settings | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")
def test_freed_memory_stays_with_the_process():
    """Counted by the system: pages that had to be cleared anew for blocks of a size used before."""
    kept, _, pages = run(FAULTS, "keep")
    returned, *_ = run(FAULTS)
    assert int(kept) < 0.01 * int(pages) < 0.5 * int(pages) < int(returned)


def test_threads_wait_asleep_unless_told_otherwise():
    script = "import utils, os; print(os.environ['OMP_WAIT_POLICY'])"
    assert run(script) == ["passive"] and run(script, OMP_WAIT_POLICY="active") == ["active"]
