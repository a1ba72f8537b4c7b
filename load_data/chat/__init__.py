"""Chat: dialogues to rows of tokens."""
