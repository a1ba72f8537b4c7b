"""Quantisation of a trained model: what its layers read, and the codes that fit it best."""
