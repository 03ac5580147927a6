"""Steps of the bias update on one rank's rows; run by test_moe_training.py."""

import torch
from builders import tiny_model, token_ids

from kimi_linear.training.expert_loads import ExpertLoads

ROWS, STEPS, RATE = 8, 3, 0.02


def save_biases(rank: int, world: int, folder: str) -> None:
    torch.save(train(rank, world), f"{folder}/biases.{rank}")


def train(rank: int, world: int) -> torch.Tensor:
    """Biases [L, E] after some steps on this rank's share of the rows."""
    model = tiny_model().train()
    loads = ExpertLoads(model)
    for step in range(STEPS):
        rows = token_ids(ROWS, 21, seed=step)[rank::world]
        model(rows, labels=rows).loss.backward()
        loads.update_biases(loads.take(), RATE)
    return torch.stack([router.e_score_correction_bias for router in loads.routers])
