"""Settings of a run, their limits, and presets."""
