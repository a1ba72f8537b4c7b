"""The training engine that every stage shares."""
