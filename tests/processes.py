"""Several processes of one group, with gloo on a CPU, for tests.

What fails in a process is raised in the test.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTS = ["kimi_linear", "torch.distributed.fsdp", "torch.distributed.pipelining"]
IMPORTS += ["transformers.trainer", "transformers.generation.utils"]
Function = Callable[[int, int, str], None]


def run(world: int, functions: list[Function], folder: Path) -> None:
    """Each `function(rank, world, folder)` in turn, in `world` processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked from a process that has done nothing but import
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTS)
    arguments = (world, port, functions, str(folder))
    mp.start_processes(_process, arguments, nprocs=world, start_method="forkserver")


def _process(rank: int, world: int, port: int, functions: list[Function], folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        for function in functions:
            function(rank, world, folder)
    finally:
        dist.destroy_process_group()
