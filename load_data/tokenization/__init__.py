"""Tokenization: text to ids and back."""
