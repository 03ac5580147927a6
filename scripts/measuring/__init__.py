"""Measurements of benchmark.py, of the experiments and of benchmarks/."""
