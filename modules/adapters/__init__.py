"""Adapters: trainable parts added to a frozen model."""
