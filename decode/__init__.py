"""Decoding as one recorded graph: when, what it launches, its kernels."""
