"""Weights on disk: names in and out, checks, the flat copy of the code beside them."""
