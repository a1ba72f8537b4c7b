"""Quantisation: weights, activations and caches in a few bits."""
