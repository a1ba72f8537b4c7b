"""The proof of training: gradients before the run, weights after it."""
