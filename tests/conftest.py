"""Shared settings of all tests: no network, no window for pictures, and one thread, which is faster on tiny
tensors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

torch.set_num_threads(1)


def pytest_configure(config):
    """`pytest -m "not slow"` leaves out the tests of more than a few seconds."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
