"""Count what a decode step launches: its kernels, and torch's.

python tests/support/launches.py
"""

from collections import Counter
from typing import Any
from unittest import mock

import torch
from decode_models import decode_model
from packed_models import every_part
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.decode import (
    delta_rule,
    few_rows,
    fixed_point,
    many_rows,
    packed,
    packed_few_rows,
    router,
    step,
)
from kimi_linear.decode.recording import StepKind, decode_step
from kimi_linear.quantization.packing import pack_rest
from kimi_linear.schemes import Scheme

MODULES = (delta_rule, few_rows, fixed_point, many_rows, packed, packed_few_rows, router, step)


class _Counted:
    """A kernel whose launches are counted, and do nothing."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.counts[self.name] += 1

        return launch


class _TorchKernels(TorchDispatchMode):
    """Counts operations, unless they make views."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def layer_plan_model(device: str) -> KimiLinearForCausalLM:
    """The 48B model's layers, with small sizes."""
    config = KimiLinearConfig.from_preset("48b-a3b")
    linear = {**config.linear_attn_config, "num_heads": 2, "head_dim": 32}
    layers = {"num_hidden_layers": config.num_hidden_layers, "linear_attn_config": linear}
    sizes = {"hidden_size": 96, "intermediate_size": 96, "moe_intermediate_size": 32}
    return decode_model(device, **layers, **sizes)


def launches_of_a_step(model: Any, num_rows: int = 1) -> Counter[str]:
    """How often each kernel is launched, by name."""
    counts: Counter[str] = Counter()
    names = ((module, name) for module in MODULES for name in vars(module))
    recorded = decode_step(model, StepKind(num_rows))
    patches = [
        mock.patch.object(module, name, _Counted(name, counts))
        for module, name in names
        if name.endswith("_kernel")
    ]
    for patch in patches:
        patch.start()
    try:
        with _TorchKernels(counts):
            recorded.run()
    finally:
        for patch in patches:
            patch.stop()
    return counts


if __name__ == "__main__":
    with torch.no_grad():
        model = layer_plan_model("cpu")
        for title in ("plain", "packed"):
            found = launches_of_a_step(model)
            print(title, found.total(), dict(found))
            pack_rest(model, every_part(Scheme(4, 32), Scheme(8, None)))
