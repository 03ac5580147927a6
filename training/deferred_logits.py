"""`outputs.logits` of training with a loss that needs none: made only if something reads them.

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kimi_linear.ops.quantized import QuantizedTensor
from kimi_linear.ops.runtime import no_autocast, product_dtype

# Of the head's weight, by which a change is noticed.
SAMPLE_ELEMENTS = 4096
aten = torch.ops.aten


class DeferredLogits(Tensor):
    """Logits that are made when their numbers are first used, with their gradient.

    To autograd and to whoever asks for shape, dtype or device they are a tensor like any other.
    They are those of their forward pass: to make them after the head's weights have changed is an
    error.
    """

    values: _Once

    @staticmethod
    def __new__(
        cls, values: _Once, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> DeferredLogits:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device
        )
        made.values = values
        return made

    @classmethod
    def of(cls, head: Any, hidden_states: Tensor) -> DeferredLogits:
        """`head(hidden_states)` of a plain head, under the autocast of now."""
        return _DeferredLinear.apply(hidden_states, head.weight, product_dtype(hidden_states))

    @property
    def is_made(self) -> bool:
        return self.values.made is not None

    def tensor(self) -> Tensor:
        """The logits as a plain tensor."""
        return aten.alias(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, cls) and not first.is_made:
            if func is aten._to_copy.default:  # accelerate, of a model's outputs
                dtype, device = kwargs.get("dtype"), kwargs.get("device")
                later = _Once(lambda: func(first.values(), **kwargs))
                return cls(later, first.shape, dtype or first.dtype, device or first.device)
            if func is aten.view.default and tuple(args[1]) == first.shape:  # DDP, of outputs
                return cls(first.values, first.shape, first.dtype, first.device)
        args, kwargs = tree_map_only(cls, lambda each: each.values(), (args, kwargs))
        out = func(*args, **kwargs)
        return first if isinstance(first, cls) and out is args[0] else out  # of in-place operations

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files have the logits themselves, without their graph."""
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


def _of_tensor(name: str) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tensor(), name)(*args, **kwargs)

    return method


for _name in ("data_ptr", "numpy", "tolist", "untyped_storage", "__dlpack__"):
    setattr(DeferredLogits, _name, _of_tensor(_name))  # these read memory past the dispatcher


class _Once:
    """What `make` gives, made once."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Any = make
        self.made: Any = None

    def __call__(self) -> Tensor:
        if self.made is None:
            self.made, self._make = self._make(), None
        return self.made


class _DeferredLinear(torch.autograd.Function):
    """`F.linear` in the given dtype, whose output is made later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight_VD)
        ctx.dtype = dtype
        shape = torch.Size((*x.shape[:-1], weight_VD.shape[0]))
        return DeferredLogits(_product_later(x, weight_VD, dtype), shape, dtype, x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight_VD), dtype = ctx.saved_tensors, ctx.dtype
        dx = dweight_VD = None
        with no_autocast(grad.device):
            if ctx.needs_input_grad[0]:
                dx = (grad.to(dtype) @ weight_VD.to(dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dweight_VD = grad.to(dtype).flatten(0, -2).t() @ x.to(dtype).flatten(0, -2)
                dweight_VD = dweight_VD.to(weight_VD.dtype)
        return dx, dweight_VD, None


def _product_later(x: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> _Once:
    """The product, unless the weights have changed when it is asked for."""
    x, weight_VD = x.detach(), weight_VD.detach()  # these share the version counters
    versions, sample = (x._version, weight_VD._version), _fingerprint(weight_VD)
    is_plain = not isinstance(weight_VD, QuantizedTensor)

    def make() -> Tensor:
        has_changed = versions != (x._version, weight_VD._version)
        # FSDP has divided it again
        is_gone = is_plain and weight_VD.untyped_storage().size() == 0
        # some optimizers write past the version counter
        if has_changed or is_gone or not torch.equal(_fingerprint(weight_VD), sample):
            raise RuntimeError(
                "outputs.logits cannot be made any more: lm_head's weight has changed since the "
                "forward pass; read them before optimizer.step(), or set "
                "model.loss_backend = 'logits'"
            )
        # made in inference mode, they could not be read outside of it
        with torch.inference_mode(False), torch.no_grad(), no_autocast(x.device):
            return F.linear(x.to(dtype), weight_VD.to(dtype))

    return _Once(make)


def _fingerprint(weight: Tensor) -> Tensor:
    """A copy of some numbers from all over the weight; none of what cannot be written to."""
    if isinstance(weight, QuantizedTensor):
        return torch.empty(0)
    return weight.flatten()[:: max(1, weight.numel() // SAMPLE_ELEMENTS)].clone()
