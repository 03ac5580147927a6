"""Optimizers and learning-rate schedules that demo.py, train.py and finetune.py offer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.training.parameter_groups import parameter_groups

SCHEDULES = ("constant", "cosine", "wsd")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
# Coefficients of the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Moonlight's factor, arXiv 2502.16982 section 2.2: updates as large as AdamW's, so that both share
# a learning rate.
MUON_RMS = 0.2


def schedule_factor(kind: str, progress: float, warmup: float = 0.02, decay: float = 0.4) -> float:
    """Factor on the learning rate.

    Args:
        kind: "constant", "cosine", or "wsd" (constant, then a linear descent to 0).
        progress: Fraction of the training that is done, from 0 to 1.
        warmup: Fraction over which the factor rises from 0; any kind.
        decay: Fraction at the end over which "wsd" descends.

    Returns:
        A factor from 0 to 1.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule={kind!r} is not allowed: it must be one of {SCHEDULES}")
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))
    if kind == "wsd" and decay > 0:
        return min(1.0, (1 - progress) / decay)
    return 1.0


class Muon(torch.optim.Optimizer):
    """Muon for matrices inside the network, AdamW for everything else, in one optimizer.

    A matrix's update is its momentum, orthogonalised by Newton-Schulz iterations (Jordan et al.
    2024), scaled as in Moonlight (arXiv 2502.16982) so that the learning rate and weight decay of
    AdamW fit. A tensor [E, m, n] is E matrices.

    Args:
        groups: From `parameter_groups` with `muon=True`: those whose "muon" is true get Muon.
        lr: Learning rate of both.
        momentum: Muon's momentum (Nesterov's form).
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon_update if group["muon"] else self._adam_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter, group), alpha=-group["lr"])
        return loss

    def _muon_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                "optimizer='muon' is not allowed with sharded parameters (FSDP2), since it needs "
                "whole matrices: it must be 'adamw'"
            )
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(average, group["momentum"])
        scale = MUON_RMS * max(parameter.shape[-2:]) ** 0.5
        return orthogonalise(ahead).to(parameter.dtype).mul_(scale)

    def _adam_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(
                step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter)
            )
        state["step"] += 1
        mean = state["mean"].lerp_(parameter.grad, 1 - beta1)
        square = state["square"].lerp_(parameter.grad.square(), 1 - beta2)
        mean = mean / (1 - beta1 ** state["step"])
        return mean / ((square / (1 - beta2 ** state["step"])).sqrt_() + group["eps"])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of [..., m, n] by values near 1, in float32."""
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizer(
    kind: str, model: nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a name in `OPTIMIZERS`, with the groups of `parameter_groups`.

    Raises:
        ValueError: If there is no such optimizer, it is not installed, or for a parameter that is
            in no group.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer={kind!r} is not allowed: it must be one of {OPTIMIZERS}")
    groups = parameter_groups(model, weight_decay, muon=kind == "muon")
    if kind == "muon":
        return Muon(groups, lr)
    if kind == "adamw8bit":
        return _adamw_8bit(model, groups, lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def _adamw_8bit(model: nn.Module, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW: states of 8 bits, but of 32 for embeddings, as its authors advise, and
    for small tensors."""
    try:
        from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
    except ImportError as error:
        raise ValueError(
            f"optimizer='adamw8bit' needs bitsandbytes, which cannot be imported ({error})"
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(
                module, "weight", {"optim_bits": 32}
            )
    return AdamW8bit(groups, lr=lr, betas=(0.9, 0.95))
