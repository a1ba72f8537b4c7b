"""What can be chosen: dataclasses with validation (`schema.py`) and presets as JSON (`presets/`)."""
