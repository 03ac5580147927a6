"""scripts/experiment_kernels.py: KDA as the general operator, and small runs."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import experiment_kernels
import pytest
import torch
from experiment_kernels import Inputs, Runner, Settings, dplr_arguments, kda_arguments
from one_thread import one_thread  # noqa: F401
from tolerance import assert_close
from torch import Tensor

from kimi_linear.ops.kda import kda_attention

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"device": "cpu", "heads": 2, "head_dim": 16, "repeats": 2}


def inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    x = Inputs.random(20, Settings(heads=3, head_dim=16), CPU, dtype)
    return Inputs(**{name: value.to(dtype) for name, value in vars(x).items()})


def dplr(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor) -> Tensor:
    """S_t = (Diag(exp g) + b a^T) S_{t-1} + k v^T, read with q."""
    state = torch.zeros(*q.shape[2:], v.shape[-1], dtype=q.dtype)
    out = []
    for t in range(q.shape[1]):
        read = torch.einsum("hk,hkv->hv", a[0, t], state)
        state = state * gk[0, t].exp().unsqueeze(-1)
        state = state + torch.einsum("hk,hv->hkv", b[0, t], read)
        state = state + torch.einsum("hk,hv->hkv", k[0, t], v[0, t])
        out.append(torch.einsum("hk,hkv->hv", q[0, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(out).unsqueeze(0)


def test_kda_is_the_general_operator() -> None:
    x = inputs()
    expected = kda_attention(x.q, x.k, x.v, x.raw_g, x.raw_beta, A_log=x.A_log, dt_bias=x.dt_bias)
    assert_close(dplr(**dplr_arguments(x)), expected[0], torch.float32)  # decays are float32


def test_decays_forget_and_keep() -> None:
    x = Inputs.random(512, Settings(), CPU, torch.float32)
    decay = kda_arguments(x)["g"].exp()
    low, high = decay.quantile(0.02), decay.quantile(0.98)
    assert low < 0.6 and 0.98 < high < 1
    assert decay.log().min() > -5


def test_backward_reaches_all_inputs() -> None:
    runner = Runner("package", inputs(torch.float32))
    runner.run("forward+backward")
    assert all(tensor.grad.any() for tensor in runner.tensors.values())
    assert len(runner.milliseconds("forward", 3)) == 3


def test_a_run_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    lines = experiment_kernels.main(**SMALL, lengths=(64, 32), output=output)
    assert [json.loads(text) for text in output.read_text().splitlines()] == lines
    found = [line for line in lines if line["event"] == "kernel"]
    places = [(line["length"], line["operator"], line["pass"]) for line in found]
    assert places == [
        (length, name, kind)
        for length in (32, 64)
        for name in experiment_kernels.OPERATORS
        for kind in experiment_kernels.PASSES
    ]
    for line in found:
        if line["operator"] == "package":
            assert 0 < line["ms_best"] <= line["ms"]
        elif importlib.util.find_spec("fla") is None:
            assert "ModuleNotFoundError" in line["error"]


def test_time_limit() -> None:
    lines = experiment_kernels.main(**SMALL, lengths=(32,), operators=("package",), time_limit=1e-6)
    errors = [line["error"] for line in lines if line["event"] == "kernel"]
    assert errors == ["not run: --time-limit is spent"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": ("gla",)}, "--operators 'gla' is not allowed"),
        ({"lengths": (8,)}, "--lengths"),
        ({"head_dim": 24}, "--head-dim 24 is not allowed"),
        ({"repeats": 0}, "--repeats 0"),
        ({"processes": -1}, "--processes -1"),
        ({"autotune": -1}, "--autotune -1"),
    ],
)
def test_what_the_script_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment_kernels.main(**{**SMALL, **options})
