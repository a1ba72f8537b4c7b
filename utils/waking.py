"""Decide how threads wait for each other, by measuring how long it takes to wake one.

A waiting OpenMP thread can spin, which keeps a core busy, or sleep. Waking it takes 4 microseconds on one
machine and 60 to 130 on another, where sleeping costs a quarter of the speed (docs/experiments.md, 5).
"""

import os
import threading
import time


def choose_waiting(environment) -> None:
    """Set the variable that the OpenMP library reads when PyTorch loads, unless the user has set either."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        spin, sleep = {"GOMP_SPINCOUNT": "20000"}, {"OMP_WAIT_POLICY": "passive"}  # spin for some 100 us
        environment.update(spin if wake_seconds() > 22e-6 else sleep)  # 9 to 20 us on a fast machine


def wake_seconds() -> float:
    """Return the shortest time it took to wake a thread on another core, or 0 if it cannot be measured."""
    if not hasattr(os, "sched_getaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        return 0.0
    (question, ask), (answer, reply) = os.pipe(), os.pipe()

    def echo():
        os.sched_setaffinity(0, cores[1:2])  # 0 is the calling thread, not the process
        while byte := os.read(question, 1):
            os.write(reply, byte)

    thread = threading.Thread(target=echo)
    thread.start()
    os.sched_setaffinity(0, cores[:1])
    times = []
    for _ in range(20):
        time.sleep(0.0003)  # lets the other core go idle
        start = time.perf_counter()
        os.write(ask, b"?")
        os.read(answer, 1)
        times.append(time.perf_counter() - start)
    os.close(ask)  # ends the thread
    thread.join()
    os.sched_setaffinity(0, cores)
    for end in (question, answer, reply):
        os.close(end)
    return min(times) / 2  # each round trip wakes two threads
