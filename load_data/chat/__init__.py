"""Chat: from dialogues to rows of tokens."""
