"""Models whose weights are packed, of random numbers: made on a device without 16-bit copies."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.quantization.packing import check_places, packed_places
from kimi_linear.schemes import Scheme

# Of each byte of float8 codes all but the highest bit of the exponent: numbers below 2, no NaN.
FLOAT8_MASK = -0x40404041
# Scales of groups are between these parts of the usual one.
SPREAD = (0.75, 1.25)


def put_packed(
    model: Any, quantization: KimiLinearQuantizationConfig, device: Any = "meta"
) -> None:
    """Put packed weights that are not set in the place of all that are packed, one by one.

    Raises:
        ValueError: If groups do not divide the inputs of one.
    """
    check_places(model, quantization)
    for place in list(packed_places(model, quantization)):
        old = place.weights
        empty = PackedWeights.empty(tuple(old.shape), place.scheme, old.dtype, device)
        setattr(place.module, place.attribute, nn.Parameter(empty, requires_grad=False))


def fill_packed(name: str, weights: PackedWeights, std: float) -> None:
    """Random codes of any value, and scales with which weights have this standard deviation.

    Args:
        name: Decides the numbers.
        weights: To be filled.
        std: Of all weights.
    """
    generator = torch.Generator(weights.device).manual_seed(zlib.crc32(name.encode()))
    scheme = weights.scheme
    for plane in weights.planes:
        limits = torch.iinfo(plane.dtype)
        plane.random_(limits.min, limits.max + 1, generator=generator)
        if scheme.is_float:
            plane.bitwise_and_(FLOAT8_MASK)
    scale = std / code_spread(scheme)
    weights.scale.uniform_(scale * SPREAD[0], scale * SPREAD[1], generator=generator)
    if weights.zero is not None:
        weights.zero.fill_(scheme.middle)
    # a sign for each group: codes reach one further below the middle than above it
    signs = torch.empty_like(weights.scale).uniform_(-1, 1, generator=generator).sign_()
    weights.scale.mul_(signs)


def code_spread(scheme: Scheme) -> float:
    """Root mean square of a weight of random codes whose scale is 1."""
    codes = torch.arange(1 << scheme.bits, dtype=torch.uint8)
    if scheme.is_float:
        values = (codes & 0xBF).view(torch.float8_e4m3fn).double()
    else:
        values = codes.double() - scheme.middle
    return float(values.square().mean().sqrt())


def held_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter takes."""
    return parameter.held_bytes() if isinstance(parameter, PackedWeights) else parameter.nbytes
