"""A quantised tensor in a parameter's place: any computation sees the weights in full.

Whatever computes with it is given plain weights, made for that moment; nothing can write to it.
Backward passes make them again, so that a graph holds the quantised form.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_data: Any = Tensor.data


# A context in which attributes of quantised tensors are read as those of any tensor, a tenth of a
# microsecond each: by way of `__torch_function__` it is more than one, some ten times a product.
quick_attributes = torch._C.DisableTorchFunctionSubclass


class QuantizedTensor(Tensor):
    """A frozen tensor whose numbers are held in fewer bits than its dtype has.

    A subclass holds them, and has `dequantized`, `held_bytes` and `like`.

    Attributes:
        is_indexable: Whether `tensor[i]` takes time and memory for that part only.
    """

    is_indexable = False

    @classmethod
    def wrap(cls, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
        """A new instance without anything that it holds."""
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=dtype, device=device
        )

    def dequantized(self) -> Tensor:
        """The weights, a plain tensor of this one's shape and dtype."""
        raise NotImplementedError

    def held_bytes(self) -> int:
        """Bytes of the quantised form, scales and tables included."""
        raise NotImplementedError

    def like(self, device: torch.device, dtype: torch.dtype) -> "QuantizedTensor":
        """The same weights on another device, seen in another dtype."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear` by these weights, where no graph is recorded."""
        return F.linear(x, self.dequantized(), bias)

    def part(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The result of an operation that needs only some of the weights; None: it needs all."""
        return None

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        """As any tensor's. `Module.to` writes to it where the kind of device stays."""
        return _data.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        _data.__set__(self, new)
        vars(self).update(vars(new))  # what holds the numbers, which torch knows nothing of

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The product of a linear layer where no graph is recorded, without the way through each of
        its operations, which takes the host longer than a GPU to multiply."""
        if func is F.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, bias = (*args, None)[:3]
            with quick_attributes():
                x, bias = plain_weights(x), None if bias is None else plain_weights(bias)
                if isinstance(weight, QuantizedTensor):
                    return weight.linear(x, bias)
            return F.linear(x, weight, bias)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, cls):
            if func in (aten.detach.default, aten.alias.default, aten.clone.default):
                return first.like(first.device, first.dtype)
            if func is aten._to_copy.default:
                device, dtype = kwargs.get("device"), kwargs.get("dtype")
                return first.like(torch.device(device or first.device), dtype or first.dtype)
            if func is aten.set_.source_Tensor and first is args[1]:  # torch's parametrize
                return first
            if func._schema.is_mutable:
                raise ValueError(
                    "quantised weights cannot be written to: load the model without quantisation "
                    "and merge the adapters there"
                )
            found = first.part(func, args, kwargs)
            if found is not None:
                return found
        args, kwargs = tree_map_only(QuantizedTensor, lambda x: x.dequantized(), (args, kwargs))
        return func(*args, **kwargs)


class TransposedWeights(QuantizedTensor):
    """The transpose of a quantised matrix, which linear layers multiply by: their backward pass
    keeps this one, not a plain matrix."""

    of: QuantizedTensor

    @staticmethod
    def __new__(cls, of: QuantizedTensor) -> "TransposedWeights":
        made = cls.wrap(reversed(of.shape), of.dtype, of.device)
        made.of = of
        return made

    def dequantized(self) -> Tensor:
        return self.of.dequantized().t()

    def held_bytes(self) -> int:
        return self.of.held_bytes()

    def like(self, device: torch.device, dtype: torch.dtype) -> "TransposedWeights":
        return TransposedWeights(self.of.like(device, dtype))

    def part(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        # another tensor than `of`, which autograd would take for a view of this one
        return self.of.like(self.device, self.dtype) if func is aten.t.default else None

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"TransposedWeights({self.of})"


def plain_weights(weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights as a plain tensor, of a dtype if one is given."""
    if isinstance(weights, QuantizedTensor):
        weights = weights.dequantized()
    return weights if dtype is None else weights.to(dtype)


def indexed_weights(weights: Tensor) -> Tensor:
    """What to take single matrices of [E, .., ..] from: plain weights where each would cost all."""
    is_indexable = not isinstance(weights, QuantizedTensor) or weights.is_indexable
    return weights if is_indexable else plain_weights(weights)


def has_quantized(model: nn.Module, kind: type = QuantizedTensor) -> bool:
    """Whether some of the model's parameters are quantised tensors, of a kind if one is given."""
    return any(isinstance(parameter, kind) for parameter in model.parameters())
