"""Idle cores are counted as the kernel counts them; threads spin on idle cores; a user's own choice stays."""

import os
import subprocess
import sys

import pytest

from tests.train.tools import ROOT
from utils import cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
SPIN, SLEEP = {"GOMP_SPINCOUNT": "6000"}, {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(("idle", "threads", "chosen"), [
    (2.0, 2, SPIN), (1.6, 2, SPIN), (1.0, 2, SLEEP), (0.0, 2, SLEEP),
    (1.0, 1, SPIN), (6.0, 4, SPIN), (3.0, 4, SLEEP),
])  # fmt: skip
def test_threads_spin_on_idle_cores(monkeypatch, idle, threads, chosen):
    """A busy program takes one of two cores, but may leave enough of eight."""
    monkeypatch.setattr(cores, "idle_cores", lambda: idle)
    environment = {"OMP_NUM_THREADS": str(threads)}
    cores.choose_waiting(environment)
    assert environment == {"OMP_NUM_THREADS": str(threads)} | chosen


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_users_choice_stays(monkeypatch, name):
    monkeypatch.setattr(cores, "idle_cores", lambda: pytest.fail("nothing to measure"))
    environment = {name: "active"}
    cores.choose_waiting(environment)
    assert environment == {name: "active"}


def test_the_kernels_table_is_read_as_its_manual_says(monkeypatch, tmp_path):
    """proc(5): user nice system idle iowait irq softirq steal guest guest_nice; guests are part of user."""
    first = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 7 10 500 5 1 2 3 4 0\ncpu1 7 0 0 50 0 0 0 0 0 0\nintr 5 6\n"
    then = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 101 8 10 501 6 1 2 3 5 0\ncpu1 9 0 0 50 0 0 0 0 0 0\nintr 5 6\n"
    stat = tmp_path / "stat"
    stat.write_text(first)
    monkeypatch.setattr(cores, "STAT", stat)
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: stat.write_text(then))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert cores.idle_cores() == pytest.approx(3 / 4)  # of 4 ticks 1 nice, 1 idle, 1 iowait; of 2 none
    stat.write_text(first)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert cores.idle_cores() == pytest.approx(3 / 4)


def test_busy_cores_are_not_idle():
    if os.nice(0) > 0:
        pytest.skip("of low priority itself, as are its children")
    mine = sorted(os.sched_getaffinity(0))
    code = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code, str(cpu)]) for cpu in mine]
    try:
        cores.time.sleep(0.2)
        assert cores.idle_cores(0.2) < 0.5 * len(mine)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_hyper_threads_and_affinity_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "siblings_of", lambda cpu: f"{cpu % 2},{cpu % 2 + 2}")
    assert cores.physical_cores() <= 2


def test_it_is_decided_before_pytorch_is_loaded():
    """The OpenMP library reads the variables when PyTorch loads it."""
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    code = f"import sys, os, utils; print('torch' in sys.modules, len({names} & {{*os.environ}}))"
    clean = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "1"], done.stdout + done.stderr
