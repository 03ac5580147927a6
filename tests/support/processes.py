"""Several processes of one group for tests: with gloo on a CPU, with NCCL on GPUs, one each.

What fails in a process is raised in the test.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring.autotuning import limit_autotuning
from tolerance import assert_kernel_close

from kimi_linear.parallel.tensor import joined

IMPORTS = ["kimi_linear", "torch.distributed.fsdp", "torch.distributed.pipelining"]
IMPORTS += ["transformers.trainer", "transformers.generation.utils"]
Function = Callable[[int, int, str], None]


def fits(world: int, device_type: str) -> bool:
    """Whether there is a device for each of so many processes."""
    return device_type == "cpu" or torch.cuda.device_count() >= world


TWO_GPUS = pytest.mark.skipif(not fits(2, "cuda"), reason="needs two GPUs")
DEVICE_TYPES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]


def context() -> Any:
    """Starts processes: without a GPU by forking one that has done nothing but import."""
    found = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if found.get_start_method() == "forkserver":
        found.set_forkserver_preload(IMPORTS)
    return found


def run(world: int, functions: list[Function], folder: Path, device_type: str = "cpu") -> None:
    """Each `function(rank, world, folder)` in turn, in `world` processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = context().get_start_method()
    arguments = (world, port, functions, str(folder), device_type)
    unseen = {"CUDA_VISIBLE_DEVICES": ""} if device_type == "cpu" else {}
    with mock.patch.dict(os.environ, unseen):
        mp.start_processes(_process, arguments, nprocs=world, start_method=method)


def _process(
    rank: int, world: int, port: int, functions: list[Function], folder: str, device_type: str
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if device_type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        dist.init_process_group("gloo", rank=rank, world_size=world)
    else:
        limit_autotuning(2)
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", rank=rank, world_size=world, device_id=device())
    try:
        for function in functions:
            function(rank, world, folder)
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this process of a group computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def here(x: Any) -> Any:
    """A model, a tensor, or a mapping of tensors on the process' device."""
    if isinstance(x, dict):
        return {name: here(value) for name, value in x.items()}
    return x.to(device())


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor of all processes, of which each has a part."""
    x = joined(x)
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_same(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Within 1e-5 of the largest value; on a GPU, where kernels multiply in their inputs' dtype and
    sum in other orders, by the root mean square."""
    found = whole(found).to(expected.device)
    if expected.is_cuda:
        excess = 10 if what.endswith(("A_log", "dt_bias")) else 2  # sums that nearly cancel
        assert_kernel_close(found, expected, expected.dtype, what, excess)
        return
    assert found.shape == expected.shape, f"{what}: {found.shape} is not {expected.shape}"
    error, size = (found - expected).abs().max(), expected.abs().max()
    assert error <= 1e-5 * size, f"{what}: {error} of {size}"


def assert_same_gradients(model: Any, plain: Any, what: str = "") -> None:
    """Of all parameters, in order; those of `model` may be sharded."""
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad, f"{what} {name}")
