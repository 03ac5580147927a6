"""Triton's compiler without a GPU: kernels whose launches only compile them, for any kind of GPU.

What uses it is a process of its own, since it takes the place of Triton's driver.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Shared memory that a program may ask for, by the GPU's compute capability: A100; RTX 3090; RTX
# 4090 and L4; H100 and H200; RTX 5090.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


class Target:
    """What the compiler asks of a driver, in place of the one there is.

    Args:
        arch: The GPU's compute capability, 90 for 9.0; it may be set anew.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        driver.set_active(self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are remembered by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class OnlyCompiled:
    """A kernel whose launches only compile it.

    Attributes:
        compiled: What came out, in the order of the launches.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return launch


class Skipped:
    """A kernel whose launches do nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def replace_kernels(module: Any, names: list[str]) -> list[OnlyCompiled]:
    """Let launches of a module's kernels compile them."""
    replaced = [OnlyCompiled(getattr(module, name)) for name in names]
    for name, kernel in zip(names, replaced, strict=True):
        setattr(module, name, kernel)
    return replaced


def resources(compiled: Any) -> dict[str, int]:
    """What a compiled kernel takes: registers of a thread, bytes of its stack, which is where
    registers spill to, and bytes of shared memory of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (max(map(int, each)) for each in zip(*USAGE.findall(text), strict=True))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}
