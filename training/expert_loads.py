"""How many tokens each expert gets, and the correction bias that evens the experts' loads out.

Source: the bias update of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664). It is
off unless the configuration, or the caller, asks for it.

Shapes: E experts, L layers with experts.
"""

import math
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LAYER_NUMBER = re.compile(r"layers\.(\d+)\.")
# peft keeps the module that it trains a copy of under this name
UNUSED_MODULE = "original_module"


class ExpertLoads:
    """Counts, in training, how many tokens each expert gets. Padding does not count, nor do forward
    passes in eval mode or without gradients, nor those that gradient checkpointing runs again.

    In a training loop:

        loads = ExpertLoads(model)
        for batches in steps:
            for batch in batches:
                model(**batch).loss.backward()
            optimizer.step()
            counts = loads.take()
            loads.update_biases(counts, rate=1e-3)
            print(load_statistics(counts, loads.layers))

    Args:
        model: A Kimi Linear model of any kind, also inside DDP, FSDP2 or peft. Counting begins.
        group: Process group over which counts are added up; None: all processes, if there are many.

    Attributes:
        layers: Numbers of the layers with experts, counted from 0.

    Raises:
        ValueError: If the model has no routed experts.
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        found = {
            name: module
            for name, module in model.named_modules()
            if hasattr(module, "e_score_correction_bias") and UNUSED_MODULE not in name
        }
        self._backbones: list[Any] = [
            each for each in model.modules() if hasattr(each, "expert_loads")
        ]
        if not found or not self._backbones:
            raise ValueError(
                f"model={type(model).__name__} is not allowed: it must be a Kimi Linear "
                "with experts"
            )
        self.routers: list[Any] = list(found.values())
        numbers = [LAYER_NUMBER.search(name) for name in found]
        self.layers = [i if m is None else int(m[1]) for i, m in enumerate(numbers)]
        self.group = group
        self._counts: list[Tensor] = []
        self._wide: list[Tensor | None] = [None] * len(self.routers)
        for backbone in self._backbones:
            backbone.expert_loads = self

    def stop(self) -> None:
        """Count no more."""
        for backbone in self._backbones:
            if backbone.expert_loads is self:
                backbone.expert_loads = None

    def add(self, counts: list[Tensor]) -> None:
        """Add a forward pass' counts, [E] of each layer."""
        assert len(counts) == len(self.routers)
        before = self._counts or [torch.zeros_like(each) for each in counts]
        self._counts = [a + b for a, b in zip(before, counts, strict=True)]

    def reset(self) -> None:
        """Forget what was counted."""
        self._counts = []

    def take(self) -> Tensor:
        """[L, E] int64, counts since the last call, summed over all processes; all have to call."""
        biases = [router.e_score_correction_bias for router in self.routers]
        device = biases[0].device
        counts = [each.to(device) for each in self._counts] or [
            torch.zeros(bias.shape, dtype=torch.int64, device=device) for bias in biases
        ]
        self.reset()
        total = torch.stack(counts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total, group=self.group)
        return total

    @torch.no_grad()
    def update_biases(self, counts_LE: Tensor, rate: float) -> None:
        """Raise the biases of experts with less than the mean load by `rate`, lower the others'.

        Args:
            counts_LE: Of a whole step, from `take`.
            rate: 1e-3 in DeepSeek-V3; 0 changes nothing.

        Raises:
            ValueError: If `rate` is not a finite number of at least 0.
        """
        check_rate("rate", rate)
        if rate == 0:
            return
        counts = counts_LE.double()
        signs = (counts.mean(dim=1, keepdim=True) - counts).sign()
        for i, router in enumerate(self.routers):
            bias = router.e_score_correction_bias
            wide = self._wide_bias(i, bias)
            wide += rate * signs[i].to(wide.device, wide.dtype)
            bias.copy_(wide)

    def _wide_bias(self, i: int, bias: Tensor) -> Tensor:
        """What the bias stands for in float32: in 16 bits, as the released checkpoints have it,
        steps would be lost to rounding. Begun anew where someone else has set the bias."""
        wide = self._wide[i]
        if wide is None or wide.device != bias.device or not torch.equal(wide.to(bias.dtype), bias):
            wide = self._wide[i] = bias.to(
                torch.promote_types(bias.dtype, torch.float32), copy=True
            )
        return wide


def load_statistics(counts_LE: Tensor, layers: list[int]) -> dict[str, float]:
    """How even the loads are: of each layer the largest over the mean load, and experts without a
    token; over the layers the largest and the sum. Empty if nothing was counted.

    Args:
        counts_LE: From `ExpertLoads.take`, or a sum of such.
        layers: `ExpertLoads.layers`.
    """
    largest = counts_LE.amax(dim=1).tolist()
    mean = counts_LE.double().mean(dim=1).tolist()
    dead = (counts_LE == 0).sum(dim=1).tolist()
    if not all(mean):
        return {}
    ratios = [top / average for top, average in zip(largest, mean, strict=True)]
    found: dict[str, float] = {"experts/max_load": max(ratios), "experts/dead": sum(dead)}
    for number, ratio, count in zip(layers, ratios, dead, strict=True):
        found[f"experts/layer_{number}/max_load"] = ratio
        found[f"experts/layer_{number}/dead"] = count
    return found


def check_rate(field: str, value: Any) -> None:
    """Raise ValueError unless it is a finite number of at least 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"{field}={value!r} is not allowed: it must be a finite number >= 0")
