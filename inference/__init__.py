"""Generation engine and chat."""
