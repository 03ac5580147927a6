"""Tests of Triton's kernels: on a GPU, or on any machine by Triton's interpreter.

The interpreter has to be chosen before triton is imported: TRITON_INTERPRET=1 python -m pytest ...
"""

import os

import pytest
import torch

try:
    import triton
except ImportError:
    triton = None

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]


def with_kernels(test):
    """Run this where there are kernels: with triton, on a GPU unless they are interpreted."""
    test = pytest.mark.skipif(triton is None, reason="needs triton")(test)
    return test if IS_INTERPRETED else pytest.mark.gpu(test)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)
