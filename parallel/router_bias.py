"""The routers' correction biases under FSDP2 as accelerate fills it from one process.

accelerate takes all of a model's state dict for DTensors, buffers too. So while a router's weight
is one and its bias on the meta device, the state dict has the bias as a DTensor; one that is loaded
becomes a plain tensor again.
"""

from typing import Any

from torch import nn

from kimi_linear.layers.moe import KimiLinearRouter
from kimi_linear.parallel.tensor import is_dtensor, replicated

NAME = "e_score_correction_bias"


def carry_router_biases(model: nn.Module) -> None:
    """Have the routers of a model do so."""
    for router in model.modules():
        if isinstance(router, KimiLinearRouter):
            router.register_state_dict_post_hook(_replicate)
            router.register_load_state_dict_pre_hook(_gather)


def _replicate(router: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if is_dtensor(router.weight) and router.e_score_correction_bias.is_meta:
        state_dict[prefix + NAME] = replicated(state_dict[prefix + NAME], router.weight)


def _gather(router: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if is_dtensor(state_dict.get(prefix + NAME)):
        state_dict[prefix + NAME] = state_dict[prefix + NAME].full_tensor()
