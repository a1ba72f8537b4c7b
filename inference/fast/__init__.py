"""The fast decoding path on CPUs."""
