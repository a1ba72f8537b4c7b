"""Long contexts: tasks that need text from far above, and their measurement."""
