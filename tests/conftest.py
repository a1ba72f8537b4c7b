"""Shared settings of all tests: no network, no window for pictures, and one thread, which is faster on tiny
tensors."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands, which set threads for the whole process

import pytest
import torch

from load_data.corpora import sources
from load_data.corpora.python_corpus import PythonCorpus, read_python_corpus
from load_data import embed_data, task_pairs
from load_data.skills import docstrings

torch.set_num_threads(1)


def pytest_configure(config):
    """`pytest -m "not slow"` leaves out the tests of more than a few seconds."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    # A shell ignores SIGINT in what it starts in the background, and nohup ignores SIGHUP.
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def library():
    """The standard library, split as by default: reading it takes seconds."""
    return read_python_corpus(0.05)


@pytest.fixture(scope="module")
def part_of_the_library(library):
    """Every twentieth file of the standard library in the place of all, for commands that train on it."""
    part = PythonCorpus(library.train[::20], library.val[::20])
    with pytest.MonkeyPatch.context() as patch:
        for module in (sources, docstrings, task_pairs, embed_data):
            patch.setattr(module, "read_python_corpus", lambda fraction: part)
        docstrings.entries.cache_clear()
        yield part
    docstrings.entries.cache_clear()
