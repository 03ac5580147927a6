"""Undocumented names of torch for what several processes have together: a process' own part of a
DTensor, and GPU memory that all processes of a group can read (symmetric memory).

Each GPU reads the others' memory itself, over NVLink; multicast, by which the switch sums, stays
off.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from torch.distributed import _symmetric_memory as symmetric_memory
except ImportError:  # another build of torch
    symmetric_memory = None  # type: ignore[assignment]

NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
SUMMED_DTYPES = (torch.bfloat16, torch.float32)  # of `SharedMemory.sum_into`


def own_tensor(x: Any) -> Tensor:
    """A process' part of a DTensor: `to_local()` in a tenth of its time, without a graph."""
    return x._local_tensor


class SharedMemory:
    """A tensor of each process of a group, in GPU memory that all of them can read.

    All processes make it at once, and call its methods at once and in the same order; what those
    launch can be recorded as a CUDA graph.

    Args:
        shape, dtype, device: Of a process' own.
        group: The processes.

    Attributes:
        own: This process' tensor.

    Raises:
        SharedMemoryError: On every process, if one of them cannot.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Any
    ) -> None:
        self._name, self._shape, self._dtype = group.group_name, shape, dtype
        if not _agree(can_share(group), device, group):
            raise SharedMemoryError("the GPUs cannot read each other's memory")
        with _without_multicast():
            self.own: Tensor = symmetric_memory.empty(shape, dtype=dtype, device=device)
            self._handle = symmetric_memory.rendezvous(self.own, group)

    def sum_into(self, out: Tensor) -> None:
        """out = sum of the processes' tensors, in the order of their ranks, the same on each."""
        torch.ops.symm_mem.one_shot_all_reduce_out(self.own, "sum", self._name, out)

    def gather_into(self, out: Tensor) -> None:
        """out [processes, *shape] = the processes' tensors, in the order of their ranks."""
        self._handle.barrier()
        for rank, place in enumerate(out):
            place.copy_(self._handle.get_buffer(rank, self._shape, self._dtype))
        self._handle.barrier()


class SharedMemoryError(RuntimeError):
    """A group's GPUs do not share memory."""


def can_share(group: Any) -> bool:
    """Whether this process sees the GPUs of all processes of a group, and they each other's memory.

    It takes processes of one host, which see the same GPUs.
    """
    if symmetric_memory is None or not torch.cuda.is_available():
        return False
    count, own = dist.get_world_size(group), torch.cuda.current_device()
    if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_out"):
        return False
    if torch.cuda.device_count() < count:
        return False
    others = [i for i in range(torch.cuda.device_count()) if i != own]
    return all(torch.cuda.can_device_access_peer(own, other) for other in others)


def _agree(is_possible: bool, device: torch.device, group: Any) -> bool:
    """Whether something is possible for every process."""
    flag = torch.tensor([is_possible], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Within, torch asks the driver for no multicast object."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before
