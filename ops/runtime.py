"""What every operation asks of its surroundings: triton, autocast, autograd, compilers, modules."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from kimi_linear.ops.quantized import QuantizedTensor

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
except ImportError:  # nothing that needs it is called then
    triton = tl = None

    class TritonError(Exception):  # type: ignore[no-redef]
        """Never raised."""


KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SILU_MODULES = tuple(type(ACT2FN[name]) for name in ("silu", "swish"))
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def jit(function: Any = None, /, *, counts: Sequence[str] = ()) -> Any:
    """`triton.jit`, or the function itself where there is no triton.

    Args:
        counts: names of numbers that differ from call to call, such as those of tokens: without it,
            1, multiples of 16 and all others have a kernel each, and a server compiles when a text
            of a new kind of length comes.
    """
    if function is None:
        return functools.partial(jit, counts=counts)
    return function if triton is None else triton.jit(function, do_not_specialize=counts)


def constexpr_function(function: Any) -> Any:
    """`triton.constexpr_function`, or the function itself where there is none."""
    return getattr(triton, "constexpr_function", lambda each: each)(function)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off for this kind of device."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def product_dtype(factor: Tensor) -> torch.dtype:
    """The dtype of products with `factor`: autocast's where it is on, else the factor's own.

    Autocast leaves float64 alone. Where two factors may differ, the caller passes the one whose
    dtype counts: an MLP's or expert's weight, the loss's hidden states.
    """
    kind = factor.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    is_cast = is_cast and factor.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else factor.dtype


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a graph is being recorded through any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def spare(x: Tensor) -> Tensor | None:
    """x, as the place of the result that replaces it, where no graph is recorded; else None."""
    return None if torch.is_grad_enabled() or is_traced() else x


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work (grad, vmap, jvp), which our own
    `autograd.Function`s, made for one backward pass, do not take part in."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# Whether a call is made for `torch.export`, whose sizes may be symbols; older torch does not tell.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_traced() -> bool:
    """Whether tensors may be stand-ins, which our own kernels and functions do not take: while a
    compiler or a transform of `torch.func` is at work."""
    return torch.compiler.is_compiling() or is_transformed()


def in_pieces(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, for memory's sake at most `size` tokens at a time where no graph is
    recorded.

    Args:
        function: treats each token by itself; its result has the first tensor's shape and dtype.
        size: tokens of a piece.
        tensors: [.., X]; all dimensions but the last count tokens.
    """
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    num_tokens = flat[0].shape[0]
    if is_exporting() or torch.is_grad_enabled() or num_tokens <= size:
        return function(*tensors)
    out = torch.empty_like(flat[0])
    for start in range(0, num_tokens, size):
        piece = slice(start, start + size)
        out[piece] = function(*[tensor[piece] for tensor in flat])
    return out.view_as(tensors[0])


def power_of_two(size: int) -> int:
    """The smallest one that is at least `size`."""
    return 1 << (size - 1).bit_length()


def ceil_div(size: int, block: int) -> int:
    """The number of blocks that hold `size`."""
    return -(-size // block)


def has_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on CUDA, with triton, neither recorded nor compiled."""
    if triton is None or is_traced():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return all(x.is_cuda and x.dtype in KERNEL_DTYPES for x in tensors)


def is_plain_silu(module: nn.Module) -> bool:
    """Whether calling an activation gives its input's SiLU and does nothing else: it is no other
    module and has no hooks."""
    own = vars(module)
    is_hooked = "forward" in own or any(own[hooks] for hooks in HOOKS)
    return type(module) in SILU_MODULES and not is_hooked


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear layer that computes `x @ weight.T` and nothing else; None
    with a bias, hooks, a forward or a class of its own, or a weight that is not all here
    (adapters, quantisation, sharding, offloading)."""
    weight = linear_weight(module)
    return weight if type(weight) in (nn.Parameter, Tensor) else None


def linear_weight(module: nn.Module) -> Tensor | None:
    """As `plain_weight`, or a `QuantizedTensor`."""
    if type(module) is not nn.Linear or module._parameters["bias"] is not None:
        return None
    own, weight = vars(module), module.weight
    if "forward" in own or any(own[hooks] for hooks in HOOKS):
        return None
    is_known = type(weight) in (nn.Parameter, Tensor) or isinstance(weight, QuantizedTensor)
    return weight if is_known and weight.dim() == 2 and not weight.is_meta else None
