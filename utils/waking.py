"""How threads should wait for each other, decided by measuring how long waking one takes.

PyTorch splits most operations over the threads of an OpenMP library. A thread that has finished its part can
spin (ready at once, but it takes a core from other programs) or sleep (free, but it must be woken). Waking
takes some 4 microseconds on one machine and 60 to 130 on another; adding 65,536 numbers takes about 7. So
sleeping is right on the first machine (docs/experiments.md, 5), and costs a quarter of the training speed on
the second. The library reads its settings once, when PyTorch loads it, so this module must run before that.
"""

import os
import threading
import time

SLOW = 35e-6  # seconds. Measured this way, Python's own part included: 9 to 20 us on the fast machine
SPIN = "20000"  # turns of GNU OpenMP's waiting loop: some 100 us, then the thread sleeps all the same
ROUNDS = 20


def choose_waiting(environment) -> None:
    """Set the variables of the OpenMP library in `environment`, unless the user has set one of them."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        return
    if wake_seconds() > SLOW:
        environment["GOMP_SPINCOUNT"] = SPIN
    else:
        environment["OMP_WAIT_POLICY"] = "passive"


def wake_seconds() -> float:
    """Return the shortest time it took to wake a thread on another core, or 0 if it cannot be measured.

    Two threads, each bound to its own core, send a byte back and forth. The shortest of several rounds
    counts, because other programs can only make a round longer.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return 0.0
    there, back = os.pipe(), os.pipe()

    def answer():
        os.sched_setaffinity(0, cores[1:2])  # 0 is the calling thread, not the process
        while os.read(there[0], 1) == b"?":
            os.write(back[1], b"!")

    thread = threading.Thread(target=answer)
    thread.start()
    os.sched_setaffinity(0, cores[:1])
    times = []
    for _ in range(ROUNDS):
        time.sleep(0.0003)  # until the other core is idle
        start = time.perf_counter()
        os.write(there[1], b"?")
        os.read(back[0], 1)
        times.append(time.perf_counter() - start)
    os.write(there[1], b".")
    thread.join()
    os.sched_setaffinity(0, cores)
    for end in (*there, *back):
        os.close(end)
    return min(times) / 2  # two threads were woken
