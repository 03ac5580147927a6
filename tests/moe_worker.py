"""Steps of the bias update on one rank's rows; started by test_moe_training.py.

Arguments: rank, world size, file of the rendezvous, prefix of the file for the biases.
"""

import sys

import torch
import torch.distributed as dist
from builders import tiny_model, token_ids
from kimi_linear.moe_training import ExpertLoads

ROWS, STEPS, RATE = 8, 3, 0.02


def main(rank: int, world_size: int, rendezvous: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    torch.save(train(rank, world_size), f"{output}.{rank}")
    dist.destroy_process_group()


def train(rank: int, world_size: int) -> torch.Tensor:
    """Biases [L, E] after some steps on this rank's share of the rows."""
    model = tiny_model().train()
    loads = ExpertLoads(model)
    for step in range(STEPS):
        rows = token_ids(ROWS, 21, seed=step)[rank::world_size]
        model(rows, labels=rows).loss.backward()
        loads.update_biases(loads.take(), RATE)
    return torch.stack([router.e_score_correction_bias for router in loads.routers])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
