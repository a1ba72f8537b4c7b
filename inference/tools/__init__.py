"""Tools that a model can call: a calculator, and a lookup in the docstrings of the standard library."""
