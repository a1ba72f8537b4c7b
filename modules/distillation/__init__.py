"""Learning from a larger model: its probabilities, its hidden states, its attention."""
