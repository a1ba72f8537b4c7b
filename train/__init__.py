"""One script per stage, and the one training engine that they share (`engine/`)."""
