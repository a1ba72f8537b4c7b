"""Plumbing that knows nothing of stages: errors, checkpoints, logs, plots, devices, processes, cost.

Scripts import this package before PyTorch, because it decides how PyTorch's threads wait (utils/cores.py).
"""

import os

from utils.cores import choose_waiting

choose_waiting(os.environ)
