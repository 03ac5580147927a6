"""A process' part of a DTensor, and which processes share their GPUs' memory."""

import pytest
import torch
import torch.distributed as dist
from processes import device, run

from kimi_linear.upstream.shared_memory import SharedMemory, SharedMemoryError, own_tensor

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]


def parts_and_sharing(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    x = torch.nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)]))
    own = own_tensor(x)
    assert torch.equal(own, x.to_local()) and own.shape == (2, 3)
    assert own.data_ptr() == x.to_local().data_ptr()
    with pytest.raises(SharedMemoryError, match="cannot read each other's memory"):
        SharedMemory((2, 3), torch.float32, device(), mesh.get_group())


def test_two_processes_on_a_cpu(tmp_path):
    run(2, [parts_and_sharing], tmp_path)
