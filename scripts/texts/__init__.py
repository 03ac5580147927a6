"""Texts: where they come from, what predicts them without a neural network, and bits per byte."""
