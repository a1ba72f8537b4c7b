"""The hand-written building blocks, one idea per file. Run one by itself: `python -m modules.rope`."""
