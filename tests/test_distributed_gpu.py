"""Trainer on two GPUs with the accelerate configurations of this repository, beside one GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ROOT = Path(__file__).parents[1]
FSDP2 = ROOT / "scripts" / "accelerate" / "fsdp2.yaml"


def train(folder, *flags, config=None):
    """Losses by step and the saved model of a run of `trainer_worker.py`."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config is None:
        command += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    else:
        precision = "bf16" if "bf16" in flags else "no"
        command += ["--config_file", str(config), "--num_processes", "2"]
        command += ["--mixed_precision", precision]
    command += ["--dynamo_backend", "no", str(ROOT / "tests" / "trainer_worker.py")]
    environ = {**os.environ, "OMP_NUM_THREADS": "2", "NVIDIA_TF32_OVERRIDE": "0"}
    if config is None:
        environ["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run(
        [*command, str(folder), *flags], env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "losses.json").read_text())
    assert config is None or found["model"].startswith("FSDP"), found["model"]
    return found["losses"], KimiLinearForCausalLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"))


def assert_same_run(found, expected, tolerance):
    """Losses, and weights by the size of what training changed."""
    (losses, model), (wanted_losses, wanted) = found, expected
    assert losses == pytest.approx(wanted_losses, rel=tolerance)
    weights = wanted.state_dict()
    for name, x in model.state_dict().items():
        error, size = (x - weights[name]).float().norm(), weights[name].float().norm()
        assert error <= 10 * tolerance * size + 1e-6, name


def test_fsdp2(tmp_path, one_gpu):
    """Four steps, and the last two again from the checkpoint after the second."""
    whole = train(tmp_path, config=FSDP2)
    assert_same_run(whole, one_gpu, 1e-3)
    again = train(tmp_path, "resume", config=FSDP2)
    assert again[0][-2:] == pytest.approx(whole[0][-2:], rel=1e-4)


@pytest.mark.parametrize("flags", [("checkpointing",), ("bf16",)])
def test_fsdp2_variants(tmp_path, one_gpu, flags):
    assert_same_run(
        train(tmp_path, *flags, config=FSDP2), one_gpu, 3e-2 if "bf16" in flags else 1e-3
    )
