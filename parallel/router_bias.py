"""The router's bias in accelerate's loading for FSDP2.

One process loads and the others take from it all of a state as DTensors, also a buffer, which FSDP
leaves whole.
"""

from typing import Any

from kimi_linear.layers.moe import KimiLinearRouter
from kimi_linear.parallel.tensor import is_dtensor, replicated
from torch import nn

BIAS = "e_score_correction_bias"


def share_router_biases(model: nn.Module) -> None:
    """Let the state of each router of a divided model have its bias as a DTensor."""
    for module in model.modules():
        if isinstance(module, KimiLinearRouter):
            module.register_state_dict_post_hook(_replicate)
            module.register_load_state_dict_pre_hook(_make_whole)


def _replicate(router: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if is_dtensor(router.weight) and router.e_score_correction_bias.is_meta:
        state_dict[prefix + BIAS] = replicated(state_dict[prefix + BIAS], router.weight)


def _make_whole(router: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if is_dtensor(state_dict.get(prefix + BIAS)):
        state_dict[prefix + BIAS] = state_dict[prefix + BIAS].full_tensor()
