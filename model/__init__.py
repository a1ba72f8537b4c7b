"""Whole models assembled from `modules/`."""
