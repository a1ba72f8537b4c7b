"""Measuring: speed, memory and grids of experiments."""
