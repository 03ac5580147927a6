"""Linear layers' products where no graph is recorded: of quantised rows, if weights ask for it.

Large products of packed weights with dynamic activations (`Scheme.activation_scheme`) are made in
float8, by layers in evaluation mode. Whatever else a layer is (training, adapters, hooks, other
weights, few rows or outputs, other hardware), it is called as it is.

Shapes: D inputs, N outputs.
"""

from typing import Any

from torch import Tensor, nn

from kimi_linear.ops.packed.float8 import (
    Float8Rows,
    float8_linear,
    quantize_rows,
    takes_float8,
    takes_library,
)
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.quantized import quick_attributes
from kimi_linear.ops.runtime import linear_weight, needs_grad, product_dtype

# Rows and outputs from which a product in float8 is faster (H200), and outputs where cuBLAS makes
# it of as many inputs. Quantising costs time by rows and inputs, and saves it by rows, inputs and
# outputs: these must be many.
MANY_ROWS, MANY_OUTPUTS, LIBRARY_SIZE = 2048, 4096, 2048


class LinearInput:
    """What linear layers read, quantised at most once however many read it.

    Args:
        x: [.., D].
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._rows: Float8Rows | None = None

    def through(self, linear: nn.Module) -> Tensor:
        """[.., N]: the layer's product."""
        with quick_attributes():
            weight = _float8_weight(self.x, linear)
            if weight is not None:
                if self._rows is None:
                    self._rows = quantize_rows(self.x.flatten(0, -2))
                out = float8_linear(self._rows, weight, self.x.dtype)
                return out.view(*self.x.shape[:-1], out.shape[-1])
        return linear(self.x)


def project(x: Tensor, linear: nn.Module) -> Tensor:
    """[.., N]: the product of x [.., D] and a linear layer."""
    return LinearInput(x).through(linear)


def _float8_weight(x: Tensor, linear: nn.Module) -> Any:
    """The weight [N, D] that quantised rows of x are multiplied by; None: call the layer."""
    weight = linear_weight(linear)
    if not isinstance(weight, PackedWeights) or linear.training or x.dim() < 2:
        return None
    is_taken = (
        x.shape[:-1].numel() >= MANY_ROWS
        and x.device == weight.device
        and weight.dtype == x.dtype == product_dtype(x)
        and not needs_grad(x)
        and takes_float8(weight)
        and _has_many_outputs(weight, x)
    )
    return weight if is_taken else None


def _has_many_outputs(weight: Any, x: Tensor) -> bool:
    if weight.shape[0] >= MANY_OUTPUTS:
        return True
    return min(weight.shape) >= LIBRARY_SIZE and takes_library(
        x.shape[:-1].numel(), weight, x.dtype
    )
