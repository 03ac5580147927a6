"""Configurations of FLA's kernels: made by `benchmarks/tune_fla.py`, read by `fla_tuning.py`."""

from typing import Any

CAPABILITY = (9, 0)
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {}
