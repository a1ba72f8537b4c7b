"""Alignment: the pieces of reinforcement learning and of learning from preferences."""
