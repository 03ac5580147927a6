"""Trainer in two processes with the accelerate configuration of this repository, beside one.

On two GPUs where they are there, else by gloo on a CPU, where accelerate has to be talked into it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]
HAS_GPUS = torch.cuda.device_count() > 1
gpu = pytest.mark.gpu
TESTS = Path(__file__).parent
FSDP2 = TESTS.parent / "scripts" / "accelerate" / "fsdp2.yaml"


def train(folder, *flags, is_sharded=True):
    """Losses by step and the saved model of a run of `trainer_worker.py`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--dynamo_backend", "no"]
    command += ["--mixed_precision", "bf16" if "bf16" in flags else "no"]
    if is_sharded:
        command += ["--config_file", str(FSDP2), "--num_processes", "2"]
    else:
        command += ["--num_processes", "1", "--num_machines", "1"]
    command += [str(TESTS / "trainer_worker.py"), str(folder), *flags]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    if not HAS_GPUS:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not is_sharded:
        environ["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "losses.json").read_text())
    assert found["model"].startswith("FSDP") == is_sharded, found["model"]
    return found["losses"], KimiLinearForCausalLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), is_sharded=False)


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
    whole = train(tmp_path)
    assert_same_run(whole, one_process, tolerance)
    again = train(tmp_path, "resume")
    assert_same_run(again, whole, tolerance)


@gpu
@pytest.mark.skipif(not HAS_GPUS, reason="needs two GPUs")
@pytest.mark.parametrize("flag", ["checkpointing", "bf16"])
def test_fsdp2_variants(tmp_path, one_process, flag):
    assert_same_run(train(tmp_path, flag), one_process, 3e-2 if flag == "bf16" else 1e-3)
