"""The kind of GPU that kernels are compiled for."""

from functools import cache

import torch

from kimi_linear.ops.launch import driver, is_jit_function
from kimi_linear.ops.runtime import jit

INTERPRETED = 0
# Hopper and data-centre Blackwell
LARGE_MEMORY = (90, 100, 103)


@jit
def _nothing():  # type: ignore[no-untyped-def]
    pass


@cache
def architecture(device: torch.device) -> int:
    """The GPU's compute capability, 90 for 9.0; or INTERPRETED."""
    if not is_jit_function(_nothing):
        return INTERPRETED
    with torch.cuda.device(-1 if device.index is None else device.index):
        return driver.active.get_current_target().arch


def has_large_memory(device: torch.device) -> bool:
    """Whether a program has some 200 KB of shared memory."""
    return architecture(device) in LARGE_MEMORY
