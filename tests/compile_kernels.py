"""Compile the kernels of prefill and training for a Hopper GPU without having one.

Triton's interpreter runs what its compiler refuses, such as a name of two types. A process of its
own does this, since it takes the place of Triton's driver.
"""

from typing import Any

import torch
import triton
from kimi_linear import (
    conv_kernel,
    grouped_kernels,
    loss_kernel,
    prefill_kernels,
    training_kernels,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

KERNELS = {
    conv_kernel: ["_convolve"],
    grouped_kernels: ["_gate_up", "_down"],
    loss_kernel: ["_loss_and_gradient"],
    prefill_kernels: ["_silu_mul", "_weighted_sum", "_choose_experts"],
    training_kernels: ["_weighted_silu_backward", "_sum_of_rows"],
}


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class OnlyCompiled:
    """A kernel whose launches only compile it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.kernel.warmup(*args, grid=grid, **kwargs)


def compile_all(dtype: torch.dtype) -> None:
    """Once with the 48B model's sizes, once with sizes that need masks."""
    for D, I, E, k in ((2304, 1024, 256, 8), (40, 64, 6, 3)):  # noqa: E741
        x, inner = torch.zeros(2, D, dtype=dtype), torch.zeros(2 * k, I, dtype=dtype)
        order, ends = torch.zeros(2 * k, dtype=torch.int64), torch.zeros(E, dtype=torch.int32)
        grouped_kernels.gate_up(x, order, ends, torch.zeros(E, 2 * I, D, dtype=dtype), k)
        grouped_kernels.down(inner, order, ends, torch.zeros(E, D, I, dtype=dtype))
        weights, experts = prefill_kernels.choose_experts(
            torch.zeros(2, E), torch.zeros(E), k, True, 2.4
        )
        prefill_kernels.weighted_sum(torch.zeros(2 * k, D, dtype=dtype), weights, experts, E)
        prefill_kernels.silu_mul(inner, inner)
        both = torch.zeros(2 * k, 2 * I, dtype=dtype)
        training_kernels.launch_weighted_silu_backward(both, weights.flatten(), inner)
        rows = torch.zeros(2 * k, D, dtype=dtype)
        for each in (weights, None):
            training_kernels.launch_sum_of_rows(rows, experts, each)
        for state in (None, torch.zeros(1, 3, D, 3, dtype=dtype)):
            taps = [torch.zeros(D, 1, 4, dtype=dtype)] * 3
            conv_kernel.convolve_three([x[None]] * 3, taps, state, 1)
    for V in (97, 163840):
        logits, labels = torch.zeros(2, V), torch.zeros(2, dtype=torch.int64)
        for out in (dtype, torch.float32):
            loss_kernel.loss_and_gradient(logits, labels, torch.ones(()), -100, out)


if __name__ == "__main__":
    driver.set_active(Hopper())
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, OnlyCompiled(getattr(module, name)))
    compile_all(torch.bfloat16)
    print(f"compiled with triton {triton.__version__}")
