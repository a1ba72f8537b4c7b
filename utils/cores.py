"""Cores: how many this process may use, how many are idle, and how PyTorch's threads wait on them.

A waiting OpenMP thread can spin, which keeps its core busy, or sleep, and then it must be woken, which takes
longer than most waits of a training step. On free cores spinning makes training up to 1.8 times as fast;
beside a program that keeps a core busy, it makes it twice as slow (docs/experiments.md, 33).
"""

import os
import time
from pathlib import Path

SPIN = "6000"  # turns of a loop before a thread goes to sleep: longer than most waits
STAT = Path("/proc/stat")


def choose_waiting(environment) -> None:
    """Let threads spin if enough cores are idle, else sleep; only on Linux, and unless the user chose."""
    if os.access(STAT, os.R_OK) and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        needed = thread_count(environment) - 0.5
        enough = any(idle_cores() > needed for _ in range(5))  # not misled by a program that is just ending
        environment.update({"GOMP_SPINCOUNT": SPIN} if enough else {"OMP_WAIT_POLICY": "passive"})


def thread_count(environment) -> int:
    """Return `OMP_NUM_THREADS`, or the share of the cores for this process; 0 leaves it to PyTorch."""
    told = environment.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told):
        return int(told)
    cores = physical_cores()
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", "1"))) if cores else 0


def idle_cores(seconds: float = 0.06) -> float:
    """Return how many of the cores that this process may use were idle while it slept for `seconds`."""
    before = idle_ticks()
    time.sleep(seconds)
    shares = [(idle - old_idle) / max(total - old_total, 1)
              for (idle, total), (old_idle, old_total) in zip(idle_ticks(), before, strict=True)]  # fmt: skip
    return sum(shares)


def idle_ticks() -> list[tuple[int, int]]:
    """Return idle and all clock ticks of each core. Programs of low priority (nice) count as idle."""
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in STAT.read_text(encoding="utf-8").splitlines())
    ticks = [[int(word) for word in words] for name, *words in lines if name in mine]
    return [(each[1] + each[3] + each[4], sum(each[:8])) for each in ticks]  # nice, idle, waiting for a disk


def physical_cores() -> int:
    """Return the cores for this process by affinity and container limits, no hyper-threads; 0 if unknown."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return 0
    cores = len({siblings_of(cpu) for cpu in os.sched_getaffinity(0)})
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or the word `max`
        return cores


def siblings_of(cpu: int) -> str:
    """Return the logical processors that share a core with `cpu`, as Linux writes them; else `cpu` itself."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text(encoding="utf-8") if path.is_file() else str(cpu)
