"""Routed experts in 4 or 8 bits, by bitsandbytes.

Shapes: E experts, I expert width, D hidden size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.quantized import QuantizedTensor

BLOCK_SIZES = {4: 64, 8: 256}


def bitsandbytes() -> Any:
    """The module.

    Raises:
        ValueError: If it cannot be imported.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"experts cannot be quantised: bitsandbytes cannot be imported ({error})"
        ) from error
    return bitsandbytes


class QuantizedExperts(QuantizedTensor):
    """A frozen tensor [E, .., ..] held in 4 or 8 bits a number."""

    codes: Tensor
    state: Any
    bits: int

    @staticmethod
    def __new__(
        cls, codes: Tensor, state: Any, bits: int, shape: torch.Size, dtype: torch.dtype
    ) -> "QuantizedExperts":
        made = cls.wrap(shape, dtype, codes.device)
        made.codes, made.state, made.bits = codes, state, bits
        return made

    @classmethod
    def of(
        cls, weights: Tensor, bits: int, quant_type: str = "nf4", double_quant: bool = False
    ) -> "QuantizedExperts":
        """Quantise weights, on their device.

        Args:
            weights: [E, .., ..], of a floating dtype, which computations will see again.
            bits: 4 or 8.
            quant_type: "nf4" or "fp4"; of 4 bits.
            double_quant: Whether the blocks' scales are quantised too; of 4 bits.

        Raises:
            ValueError: For other bits, or without bitsandbytes.
        """
        if bits not in BLOCK_SIZES:
            raise ValueError(f"bits={bits} is not allowed: it must be one of {tuple(BLOCK_SIZES)}")
        functional, plain = bitsandbytes().functional, weights.detach().contiguous()
        if bits == 4:
            whole = plain.numel() % BLOCK_SIZES[4] == 0
            codes, state = functional.quantize_4bit(
                # its kernel for CPUs with AVX512 takes rows for whole blocks, whatever their length
                plain.reshape(-1, BLOCK_SIZES[4]) if whole else plain.reshape(1, -1),
                blocksize=BLOCK_SIZES[4],
                compress_statistics=double_quant,
                quant_type=quant_type,
            )
        else:
            codes, state = functional.quantize_blockwise(plain, blocksize=BLOCK_SIZES[8])
        return cls(codes, state, bits, weights.shape, weights.dtype)

    def dequantized(self) -> Tensor:
        """The weights [E, .., ..], a plain tensor."""
        functional = bitsandbytes().functional
        dequantize = (
            functional.dequantize_4bit if self.bits == 4 else functional.dequantize_blockwise
        )
        return dequantize(self.codes, self.state).reshape(self.shape).to(self.dtype)

    def held_bytes(self) -> int:
        return self.codes.nbytes + sum(each.nbytes for each in _state_tensors(self.state))

    def like(self, device: torch.device, dtype: torch.dtype) -> "QuantizedExperts":
        state = self.state if device == self.device else _moved(self.state, device)
        return QuantizedExperts(self.codes.to(device), state, self.bits, self.shape, dtype)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"QuantizedExperts(shape={tuple(self.shape)}, dtype={self.dtype}, bits={self.bits})"


def _state_tensors(state: Any) -> Iterator[Tensor]:
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, type(state)):
            yield from _state_tensors(value)


def _moved(state: Any, device: torch.device) -> Any:
    """A copy of bitsandbytes' state on another device."""
    made = object.__new__(type(state))
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            value = value.to(device)
        elif isinstance(value, type(state)):
            value = _moved(value, device)
        setattr(made, name, value)
    return made
