"""Semantic search in a folder: its files, their passages, and the vectors of these on disk."""
