"""DeepSpeed's ZeRO-3 on two processes of a CPU, beside one process; where it is installed."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from builders import tiny_model, token_ids
from processes import run

from kimi_linear import KimiLinearForCausalLM

pytest.importorskip("deepspeed")
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,  # else small parameters are not partitioned
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def zero3(rank: int, world: int, folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    plain = tiny_model().train()
    partitioned = HfDeepSpeedConfig(SETTINGS)  # as long as it lives, loading partitions
    model = KimiLinearForCausalLM.from_pretrained(f"{folder}/plain")
    assert partitioned.is_zero3() and not model.lm_head.weight.shape.numel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)[0]
    ids, positions = token_ids(world, 24), torch.cat([torch.arange(9), torch.arange(15)])[None]
    inputs = {"input_ids": ids, "labels": ids}
    mine = {name: x[rank : rank + 1] for name, x in inputs.items()}
    engine.train()
    loss = engine(**mine, position_ids=positions).loss
    engine.backward(loss)
    loss = loss.detach()
    dist.all_reduce(loss)
    expected = plain(**inputs, position_ids=positions).loss
    expected.backward()
    torch.testing.assert_close(loss / world, expected.detach(), rtol=1e-5, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (safe_get_full_grad(ours) - theirs.grad).abs().max()
        assert error <= 1e-5 * theirs.grad.abs().max(), f"{name}: {error}"
    whole = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        model.save_pretrained(f"{folder}/gathered", state_dict=whole)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Loading, loss, gradients, and the saved file, byte for byte."""
    tiny_model().save_pretrained(tmp_path / "plain")
    run(2, [zero3], tmp_path)
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "gathered")]
    assert files[0].read_bytes() == files[1].read_bytes()
