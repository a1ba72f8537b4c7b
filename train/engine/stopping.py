"""Signals that stop a run, agreed on by all processes."""

import signal

from utils import distributed

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopSignals:
    """A context in which Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the run after the current step.

    A second Ctrl-C stops it at once. Signals that are ignored, as under nohup, stay ignored.
    """

    def __init__(self):
        self.received = None  # by this process
        self.agreed = None  # by all processes

    def __enter__(self):
        heeded = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heeded}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _frame) -> None:
        """Remember a signal."""
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agree(self, elapsed: float) -> float:
        """Return the clock of the first process, and share the signals of all."""
        flags = [self.received == number for number in STOPPING]
        elapsed, *counts = distributed.sum_scalars([elapsed, *flags])
        self.agreed = next((number for number, count in zip(STOPPING, counts, strict=True) if count), None)
        return elapsed
