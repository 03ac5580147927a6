"""FSDP of a model in 16 bits, whose `A_log` and `dt_bias` are float32.

FSDP gathers parameters in groups of one dtype, and Transformers makes its groups of whole modules.
So while it makes them, the two parameters of each KDA layer are in a module of their own, a
`Decay`. Then they go back to their layer, and every name is what it is without FSDP. The `Decay`
stays: it stands for the parameters towards FSDP, which gathers them when the layer calls it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

NAMES = ("A_log", "dt_bias")
LIST = "decays"  # in the backbone, behind the layers: a group must not lie inside another one


class Decay(nn.Module):
    """The decay parameters of a layer: first its own, and from `give_back` on the layer's.

    Args:
        layer: A `KimiLinearDeltaAttention`; it loses its parameters until `give_back`.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child
        self._parameters.update({name: layer._parameters.pop(name) for name in NAMES})

    def forward(self, *names: str) -> dict[str, Tensor]:
        """Copies of these parameters: FSDP frees what it has gathered behind this call.

        There must be an argument: on a GPU, FSDP of torch 2.11 takes it that there is one.
        """
        return {name: getattr(self, name).clone() for name in names}

    def give_back(self) -> None:
        """Put the parameters into the layer, whose forward gathers them from now on."""
        self.layer._parameters.update(self._parameters)
        self._parameters.clear()
        self.layer.forward = _gathering(self, self.layer.forward)

    # By these two FSDP exchanges a parameter's own part for the whole and back.
    def __getattr__(self, name: str) -> Any:
        if name in NAMES and name not in self._parameters:
            return getattr(self.layer, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES and name not in self._parameters:
            self.layer._parameters[name] = value
        else:
            super().__setattr__(name, value)


def _gathering(decay: Decay, forward: Callable[..., Any]) -> Callable[..., Any]:
    parameters = decay.layer._parameters

    @functools.wraps(forward)
    def gathering_forward(*args: Any, **kwargs: Any) -> Any:
        copies: dict[str, Any] = decay(*NAMES)
        own = {name: parameters[name] for name in NAMES}
        parameters.update(copies)
        try:
            return forward(*args, **kwargs)
        finally:
            parameters.update(own)

    return gathering_forward


@contextmanager
def decays_apart(model: Any, layers: list[Any]) -> Iterator[None]:
    """Within, FSDP and tensor parallelism find the decay parameters of another dtype than their
    layer's in modules of their own; behind it, they are in their layers.

    Args:
        model: A Kimi Linear of any kind, on the meta device.
        layers: Its `KimiLinearDeltaAttention` modules.
    """
    layers = [each for each in layers if each.A_log.dtype != each.o_proj.weight.dtype]
    if not layers:
        yield
        return
    backbone = model.base_model
    prefix = "" if backbone is model else f"{model.base_model_prefix}."
    apart = {f"{prefix}layers.*.self_attn.{name}": f"{prefix}{LIST}.*.{name}" for name in NAMES}
    plans = model._tp_plan, model._fsdp_plan
    decays = [Decay(layer) for layer in layers]
    backbone.add_module(LIST, nn.ModuleList(decays))
    model._tp_plan = {apart.get(name, name): style for name, style in model._tp_plan.items()}
    model._fsdp_plan = {**model._fsdp_plan, f"{prefix}{LIST}.*": "free_full_weight"}
    try:
        yield
    finally:
        model._tp_plan, model._fsdp_plan = plans
        for decay in decays:
            decay.give_back()
