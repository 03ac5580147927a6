"""What benchmarks ask of a device, CUDA or CPU: its rates, its peak memory, and to wait for it."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
RATE_REPEATS = {"cuda": 20, "cpu": 3}
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Rates:
    """What the device was seen to do.

    Attributes:
        copy_bytes_per_second: Bytes read and written while a large tensor is copied.
        operations_per_second: Of a large square matrix product in the model's dtype.
    """

    copy_bytes_per_second: float
    operations_per_second: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure both, as medians after a warm-up."""
    count = COPY_BYTES[device.type]
    if device.type == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(count // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = _seconds(lambda: left @ right, device)
    return Rates(2 * count / copy, 2 * size**3 / product)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one of several calls in a row; on a GPU the time between two events."""
    repeats = RATE_REPEATS[device.type]
    call()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    for _ in range(repeats):
        call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3 / repeats


class PeakMemory:
    """Largest memory during a `with` block, above that at the time when this object was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        collect_garbage(device)
        is_cuda = device.type == "cuda"
        self.weights = torch.cuda.memory_allocated(device) if is_cuda else _resident("VmRSS")
        self.peak: int | None = None

    def __enter__(self) -> "PeakMemory":
        collect_garbage(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif RESET_PEAK.exists():
            RESET_PEAK.write_text("5")  # the largest size is the present one from here on
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = _resident("VmHWM")

    def figures(self, needed: int) -> dict[str, Any]:
        """The peak, and the bytes that are needed whatever the implementation."""
        above = None
        if self.peak is not None and self.weights is not None:
            above = max(0, self.peak - self.weights)
        return {"peak_bytes_above_weights": above, "needed_bytes_above_weights": needed}


def _resident(field: str) -> int | None:
    """Bytes of a field of Linux's process status; None elsewhere."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def collect_garbage(device: torch.device) -> None:
    """Give back what nobody uses: the last measurement's memory is not the next one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
