"""What quantisers of other libraries leave as it is.

Transformers' integrations quantise linear layers. Routed experts, nearly all of the parameters, are
fused tensors, which most of them pass by without a word.
"""

from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from kimi_linear.configuration_quantization import QUANT_METHOD
from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.upstream.quantizers import quantization_name

logger = logging.get_logger(__name__)


def say_what_stays_wide(model: nn.Module, config: Any) -> None:
    """Log once if routed experts have not been quantised.

    Args:
        model: With its weights, read with `config`.
        config: The quantisation's configuration; None: there is none.
    """
    method = quantization_name(config)
    if method is None or method == QUANT_METHOD:
        return
    wide = [
        parameter
        for module in model.modules()
        if isinstance(module, KimiLinearExperts)
        for parameter in module.parameters()
        if _is_wide(parameter)
    ]
    if not wide:
        return
    size, total = (sum(each.nbytes for each in part) / 1e9 for part in (wide, model.parameters()))
    logger.warning_once(
        f"quantization_config of {method!r} has left routed experts in {wide[0].dtype}: {size:.3g} "
        f"of {total:.3g} GB; KimiLinearQuantizationConfig packs them too"
    )


def _is_wide(parameter: Tensor) -> bool:
    """Whether numbers of 16 or more bits are there as such; quantisers have tensors of their own
    kinds, or integers."""
    is_plain = type(parameter.data) is Tensor
    return is_plain and parameter.is_floating_point() and parameter.element_size() > 1
