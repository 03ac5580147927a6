"""Weights in few bits in a model: packed while they are loaded, or in place."""
