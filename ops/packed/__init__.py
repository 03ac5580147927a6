"""Weights in 3, 4 or 8 bits: how they are held, made, and multiplied by."""
