"""Trainer in two processes with the accelerate configuration of this repository, beside one.

On two GPUs where they are there, else by gloo on a CPU, where accelerate has to be talked into it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch

from kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]
HAS_GPUS = torch.cuda.device_count() > 1
gpu = pytest.mark.gpu
WORKER = str(Path(__file__).parents[1] / "support" / "trainer_worker.py")
FSDP2 = Path(__file__).parents[2] / "scripts" / "accelerate" / "fsdp2.yaml"
ENVIRON = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}


def train(folder, *flags):
    """Run `trainer_worker.py` in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--dynamo_backend", "no"]
    command += ["--mixed_precision", "bf16" if "bf16" in flags else "no"]
    command += ["--config_file", str(FSDP2), "--num_processes", "2"]
    visible = {} if HAS_GPUS else {"CUDA_VISIBLE_DEVICES": ""}
    environ = {**ENVIRON, **visible, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, WORKER, str(folder), *flags],
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def result(folder, is_sharded=True):
    """Losses by step and the saved model."""
    found = json.loads((folder / "losses.json").read_text())
    assert found["model"].startswith("FSDP") == is_sharded, found["model"]
    return found["losses"], KimiLinearForCausalLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    visible = {"CUDA_VISIBLE_DEVICES": "0" if HAS_GPUS else ""}
    done = commands.run([WORKER, folder], env={**ENVIRON, **visible})
    assert done.returncode == 0, done.stderr[-4000:]
    return result(folder, is_sharded=False)


def assert_same_run(found, expected, tolerance):
    """Losses, and weights by their size."""
    (losses, model), (wanted_losses, wanted) = found, expected
    assert losses == pytest.approx(wanted_losses, rel=tolerance)
    weights = wanted.state_dict()
    for name, x in model.state_dict().items():
        error, size = (x - weights[name]).float().norm(), weights[name].float().norm()
        assert error <= 10 * tolerance * size + 1e-6, (name, error, size)


def test_fsdp2(tmp_path, one_process):
    """Four steps, and the last two again from the checkpoint after the second."""
    tolerance = 1e-3 if HAS_GPUS else 1e-5
    train(tmp_path, "resume")
    whole = result(tmp_path)
    assert_same_run(whole, one_process, tolerance)
    assert_same_run(result(tmp_path / "resumed"), whole, tolerance)


@gpu
@pytest.mark.skipif(not HAS_GPUS, reason="needs two GPUs")
@pytest.mark.parametrize("flag", ["checkpointing", "bf16"])
def test_fsdp2_variants(tmp_path, one_process, flag):
    train(tmp_path, flag)
    assert_same_run(result(tmp_path), one_process, 3e-2 if flag == "bf16" else 1e-3)
