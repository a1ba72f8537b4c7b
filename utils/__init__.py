"""Plumbing that knows nothing of stages: errors, checkpoints, logs, plots, devices, processes, cost.

Scripts import this package before PyTorch, because it decides how PyTorch's threads wait (utils/cores.py) and
how many compiled products oneDNN keeps: one for each shape, of some MB. Policies and experts have ever new
shapes, and 1024, the default, kept 1 GB more at the same speed.
"""

import os

from utils.cores import choose_waiting

choose_waiting(os.environ)
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
