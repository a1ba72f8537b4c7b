"""Generation: load a model, sample from it, hold a conversation."""
