"""Attention: every kind, the masks they share, and their caches."""
