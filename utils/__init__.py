"""Plumbing that knows nothing of stages: errors, checkpoints, logs, plots, devices, processes, cost."""
