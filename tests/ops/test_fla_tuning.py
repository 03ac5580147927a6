"""FLA's autotuners with configurations that were measured before: no search where they fit."""

import sys
import types

import pytest
import torch

from kimi_linear.ops.fla import backend
from kimi_linear.ops.fla import configs as fla_configs
from kimi_linear.ops.fla import tuning as fla_tuning

pytestmark = pytest.mark.kernels

triton = pytest.importorskip("triton")
autotuner = pytest.importorskip("triton.runtime.autotuner")


class Kernel:
    """What an autotuner chooses for: keeps what it is launched with."""

    def __init__(self):
        self.launches = []

        def some_kernel():
            pass

        self.fn = some_kernel

    def run(self, **kwargs):
        self.launches.append({name: kwargs[name] for name in ("BK", "num_warps") if name in kwargs})


class Tuner(autotuner.Autotuner):
    """Counts what it tries; its last configuration wins. It has two: experiments and GPU tests let
    no autotuner of their process have more."""

    def __init__(self):
        configs = [triton.Config({"BK": size}, num_warps=4) for size in (16, 64)]
        super().__init__(Kernel(), ["x", "y", "H", "K", "IS_VARLEN"], configs, KEY, None, None)
        self.num_searches = 0

    def _bench(self, *args, config, **kwargs):
        self.num_searches += 1
        return [1.0 / config.kwargs["BK"]]


KEY = ["H", "K", "IS_VARLEN"]
NAME = f"{__name__}.some_kernel"
KNOWN = {"K=128 bfloat16 float32": {"kwargs": {"BK": 32}, "num_warps": 2, "num_stages": 3}}


@pytest.fixture
def tuner(monkeypatch):
    tuner = Tuner()
    module = types.ModuleType("fla.some")
    module.heuristics = autotuner.Heuristics(tuner, tuner.arg_names, {})
    monkeypatch.setitem(sys.modules, "fla.some", module)
    monkeypatch.delenv("FLA_CACHE_MODE", raising=False)
    monkeypatch.setattr(fla_tuning, "CONFIGS", {NAME: KNOWN})
    monkeypatch.setattr(fla_tuning, "_is_measured_gpu", lambda: True)
    return tuner


def launch(tuner, num_heads=4, size=128, is_packed=False, dtype=torch.bfloat16):
    x, y = torch.empty(1, dtype=dtype), torch.empty(1)
    tuner.run(grid=(1,), warmup=False, x=x, y=y, H=num_heads, K=size, IS_VARLEN=is_packed)
    return tuner.fn.launches[-1]


def test_what_is_known_is_not_searched(tuner):
    """Of any number of heads, the second launch like the first."""
    fla_tuning.use_known_configs()
    fla_tuning.use_known_configs()
    for num_heads in (4, 4, 32):
        assert launch(tuner, num_heads) == {"BK": 32, "num_warps": 2}
    assert tuner.num_searches == 0


@pytest.mark.parametrize(
    "other", [{"size": 64}, {"is_packed": True}, {"dtype": torch.float16}, {"dtype": torch.float32}]
)
def test_what_is_not_known_is_searched_once(tuner, other):
    fla_tuning.use_known_configs()
    for _ in range(2):
        assert launch(tuner, **other) == {"BK": 64, "num_warps": 4}
        assert launch(tuner) == {"BK": 32, "num_warps": 2}
    assert tuner.num_searches == 2


@pytest.mark.parametrize("obstacle", ["FLA_CACHE_MODE", "gpu"])
def test_switch_and_other_gpus(tuner, monkeypatch, obstacle):
    if obstacle == "gpu":
        monkeypatch.setattr(fla_tuning, "_is_measured_gpu", lambda: False)
    else:
        monkeypatch.setenv(obstacle, "disabled")
    fla_tuning.use_known_configs()
    assert launch(tuner) == {"BK": 64, "num_warps": 4}
    assert tuner.num_searches == 2


def test_the_table_names_kernels_of_this_fla():
    """With parameters that they have, and shapes with every size that their key has."""
    pytest.importorskip("fla")
    backend.kda_kernels(), backend.norm_kernel(), backend.convolution_kernels()
    tuners = {fla_tuning.name_of(tuner): tuner for tuner in fla_tuning.autotuners()}
    for name, table in fla_configs.CONFIGS.items():
        chosen = tuners[name].configs[0].kwargs.keys()
        for shape, config in table.items():
            assert config["kwargs"].keys() == chosen, name
            sizes = {part.partition("=")[0] for part in shape.split() if "float" not in part}
            assert sizes <= set(tuners[name].keys) - chosen, (name, shape)
