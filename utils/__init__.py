"""Plumbing that knows nothing of stages: errors, checkpoints, logs, plots, devices, processes, cost.

Scripts import this before PyTorch, for one line: threads that wait for each other should sleep, not spin. On
an idle machine that costs nothing; beside one other busy program a training step is two to three times as
fast (docs/experiments.md, 5). The OpenMP library reads the setting once, when PyTorch loads it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
