"""Several processes of one group, with gloo on a CPU, for tests.

What fails in a process is raised in the test. Each process imports everything: a test should start
them once for many functions.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Function = Callable[[int, int, str], None]


def run(world: int, functions: list[Function], folder: Path) -> None:
    """Each `function(rank, world, folder)` in turn, in `world` processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (world, port, functions, str(folder)), nprocs=world)


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
