"""Gives FLA's autotuners the configurations that were measured, see `configs.py`.

FLA compiles and times every configuration of a kernel (up to 36) on its first call with new shapes
or dtypes. For KDA's kernels and those around them that takes minutes in a new process with an empty
cache, and the choice, hence the rounding, differs from run to run.
The table has what was measured once on a Hopper GPU. FLA tunes everything else itself: other GPUs,
head sizes, dtypes, and versions of FLA with other kernels.

FLA_CACHE_MODE, FLA's own switch, turns this off with whatever value it has ("disabled": FLA tunes).
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from kimi_linear.ops.fla.configs import CAPABILITY, CONFIGS
from kimi_linear.ops.launch import DirectLaunch, is_jit_function

try:
    from triton.runtime.autotuner import Autotuner
except ImportError:
    Autotuner = None

# A configuration is that of one block of work; these count blocks.
COUNTS = frozenset({"B", "H", "HV", "NB"})
COUNTS_OF_KERNEL = {"causal_conv1d_fwd_kernel": {"D"}, "causal_conv1d_bwd_kernel": {"D"}}


def name_of(tuner: Any) -> str:
    """The kernel's module and name: several modules of FLA have kernels of the same name."""
    return f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"


def shape_of(tuner: Any, key: tuple[Any, ...]) -> str:
    """What a configuration depends on, of an autotuner's key: sizes, flags, dtypes of numbers."""
    chosen = tuner.configs[0].kwargs
    names = [name for name in tuner.keys if name not in chosen]
    counts = COUNTS | COUNTS_OF_KERNEL.get(tuner.base_fn.__name__, set())
    parts = []
    for name, value in zip(names, key, strict=False):
        if name not in counts and value is not False:
            parts.append(name if value is True else f"{name}={value}")
    dtypes = {str(part).removeprefix("torch.") for part in key[len(names) :]}
    return " ".join(parts + sorted(dtype for dtype in dtypes if "float" in dtype))


class KnownConfigs(dict[tuple[Any, ...], Any]):
    """An autotuner's memory that finds what it lacks in a table, {shape: configuration}."""

    def __init__(self, tuner: Any, table: dict[str, dict[str, Any]]) -> None:
        super().__init__(tuner.cache)
        self._tuner, self._table = tuner, table

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._find(key)

    def _find(self, key: Any) -> bool:
        config = self._table.get(shape_of(self._tuner, key))
        if config is None:
            return False
        self[key] = type(self._tuner.configs[0])(**config)
        return True


def remember_choices(tuner: Any) -> None:
    """Let the autotuner launch what it has chosen without working out its key again.

    FLA works it out twice for a launch, which takes the host as long as the launch: a training step
    of the 1B model at 8,192 tokens has 300 of them.
    """
    names = [name for name in tuner.keys if name not in tuner.configs[0].kwargs]
    choices: dict[tuple[Any, ...], dict[str, Any]] = {}
    latest: dict[str, Any] | None = None
    search = tuner.run

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        latest = None
        if args:
            return search(*args, **kwargs)
        key = (
            *[kwargs.get(name) for name in names],
            *[value.dtype for value in kwargs.values() if isinstance(value, torch.Tensor)],
        )
        chosen = choices.get(key)
        if chosen is not None:
            kernel = tuner.fn.run(**kwargs, **chosen)
        else:
            kernel = search(**kwargs)
            if tuner.best_config.pre_hook is not None:
                return kernel
            chosen = choices[key] = tuner.best_config.all_kwargs()
        latest = chosen
        return kernel

    tuner.run = run
    if is_jit_function(tuner.fn):
        tuner.run = DirectLaunch(tuner.fn, run, chosen=lambda: latest, by_value=tuner.keys)


def autotuners() -> Iterator[Any]:
    """The autotuners of the modules of FLA that are imported by now."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and module is not None:
            for value in list(vars(module).values()):
                # heuristics may stand around an autotuner
                while type(value).__module__ == "triton.runtime.autotuner":
                    if isinstance(value, Autotuner):
                        break
                    value = value.fn
                if isinstance(value, Autotuner):
                    yield value


def use_known_configs() -> None:
    """Put the table into the autotuners of the modules of FLA that are imported by now."""
    if Autotuner is None or "FLA_CACHE_MODE" in os.environ or not _is_measured_gpu():
        return
    for tuner in autotuners():
        table = CONFIGS.get(name_of(tuner))
        if table and not isinstance(tuner.cache, KnownConfigs):
            tuner.cache = KnownConfigs(tuner, table)
            remember_choices(tuner)


def _is_measured_gpu() -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return all(
        torch.cuda.get_device_capability(i) == CAPABILITY for i in range(torch.cuda.device_count())
    )
