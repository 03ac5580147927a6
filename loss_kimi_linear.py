"""The loss of training without the wide logits.

At a vocabulary of 163,840 the logits of 8,192 tokens and their gradient, in float32, take 10 GB,
more than the rest of a small model's step. Here a chunk of tokens at a time goes through the head:
logits, loss, and at once the gradients of hidden states and head, so that nothing of [tokens,
vocabulary] is kept, nor made again in the backward pass (as FLA and Liger Kernel do it, but with
the head's gradient summed in float32 by products of 16-bit numbers).

Who asks for logits nevertheless gets them: `outputs.logits` is a `DeferredLogits` then.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from .kda import is_transformed, no_autocast
from .loss_kernel import loss_and_gradient, reference_loss_and_gradient
from .prefill_kernels import has_kernels
from .upstream import ForCausalLMLoss
from .wide_product import add_wide_product, wide_product

LossBackend = Literal["auto", "fused", "logits"]
# Logits of a chunk: 512 MB in float32.
CHUNK_ELEMENTS = 1 << 27
# The head's gradient is read and written once a chunk: small ones would do little else.
MIN_CHUNK_TOKENS = 64
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# Where "auto" takes it.
AUTO_DEVICES = ("cpu", "cuda")


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy of the logits `x @ weight.T`, which are never all there at once.

    Its gradients are computed with it; a second backward pass through it is refused.

    Args:
        x_ND: Hidden states; under autocast the products are of its dtype.
        weight_VD: The head.
        labels_N: int64, the token that each one has to predict.
        num_items: The sum is divided by this; None: by the number of labels that count.
        ignore_index: The label of tokens that do not count.

    Returns:
        The loss, in float32, or float64 for such products.
    """
    dtype = product_dtype(x_ND)
    wide = torch.promote_types(dtype, torch.float32)
    if num_items is None:
        num_items = (labels_N != ignore_index).sum()
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(x_ND.device)
    scale = torch.ones((), dtype=wide, device=x_ND.device) / num_items
    return _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, scale.to(wide), ignore_index, dtype)


def causal_lm_loss(
    hidden_states: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What Transformers' `ForCausalLMLoss` gives for the logits of hidden states [B, T, D], labels
    [B, T] or, already shifted, `shift_labels`. Like there, other arguments have no effect."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return linear_cross_entropy(
        hidden_states.flatten(0, -2),
        weight_VD,
        shift_labels.flatten().to(hidden_states.device),
        num_items=num_items_in_batch,
        ignore_index=ignore_index,
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast, if it is on, gives to products with `x`."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) if x.dtype != torch.float64 else x.dtype
    return x.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        scale: Tensor,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        with no_autocast(x_ND.device):
            loss, dx_ND, dweight_VD = _by_chunks(
                x_ND.to(dtype),
                weight_VD.to(dtype),
                labels_N,
                scale,
                ignore_index,
                ctx.needs_input_grad[:2],
            )
        ctx.gradients = [
            None if grad is None else grad.to(of.dtype)
            for grad, of in ((dx_ND, x_ND), (dweight_VD, weight_VD))
        ]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward pass through loss_backend='fused' is not possible, since the "
                "first one's gradients took the place of what it needs: 'logits' allows it"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if each is None else each.mul_(grad.to(each.dtype)) for each in gradients]
        return *scaled, None, None, None, None


def _by_chunks(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    scale: Tensor,
    ignore_index: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and of the gradients of `x` and `weight` those `wanted`; that of the head wide."""
    N, V = x_ND.shape[0], weight_VD.shape[0]
    wide, size = scale.dtype, chunk_tokens(V)
    dx_ND = torch.empty_like(x_ND) if wanted[0] else None
    dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
    losses_N = torch.zeros(N, dtype=wide, device=x_ND.device)
    for start in range(0, N, size):
        chunk = slice(start, start + size)
        logits_CV = wide_product(x_ND[chunk], weight_VD.t(), wide)
        compute = loss_and_gradient if has_kernels(logits_CV) else reference_loss_and_gradient
        losses_N[chunk], grad_CV = compute(
            logits_CV, labels_N[chunk], scale, ignore_index, x_ND.dtype
        )
        del logits_CV
        if dx_ND is not None:
            torch.mm(grad_CV, weight_VD, out=dx_ND[chunk])
        if dweight_VD is not None:
            add_wide_product(dweight_VD, grad_CV.t(), x_ND[chunk])
        del grad_CV
    return losses_N.sum() * scale, dx_ND, dweight_VD


def chunk_tokens(vocab_size: int) -> int:
    """C: a power of two, the largest that keeps a chunk's logits within `CHUNK_ELEMENTS`."""
    return max(MIN_CHUNK_TOKENS, 1 << max(0, (CHUNK_ELEMENTS // vocab_size).bit_length() - 1))


def uses_fused_loss(
    model: Any, hidden_states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor
) -> bool:
    """Whether the loss of this call is computed without its logits.

    Raises:
        ValueError: For an unknown `model.loss_backend`, or for "fused" in training where it is not
            possible; the message says why.
    """
    backend = model.loss_backend
    if backend not in get_args(LossBackend):
        raise ValueError(
            f"loss_backend={backend!r} is not allowed: it must be one of {get_args(LossBackend)}"
        )
    if labels is None or backend == "logits" or not (model.training and torch.is_grad_enabled()):
        return False
    if backend == "auto" and hidden_states.device.type not in AUTO_DEVICES:
        return False
    obstacle = _obstacle(model, hidden_states, labels, logits_to_keep)
    if obstacle and backend == "fused":
        raise ValueError(
            f"loss_backend='fused' is not possible here: {obstacle}; allowed are 'auto' and "
            "'logits'"
        )
    return not obstacle


def _obstacle(model: Any, x: Tensor, labels: Tensor, logits_to_keep: int | Tensor) -> str:
    """Why the logits are needed, or "". What is wrong with the arguments is said elsewhere."""
    if model.loss_function is not ForCausalLMLoss:
        return "the model has a loss_function of its own"
    if not isinstance(logits_to_keep, int) or logits_to_keep != 0 or labels.shape != x.shape[:2]:
        return "the labels are not those of all tokens"
    if torch.compiler.is_compiling():
        return "the model is being compiled"
    if is_transformed():
        return "a transform of torch.func is at work"
    if getattr(model, "_is_replica", False):
        return "the model is a replica of nn.DataParallel, which gathers outputs"
    dtype, weight = product_dtype(x), model.lm_head.weight if _is_plain(model.lm_head) else None
    if weight is None:
        return "lm_head is not a plain nn.Linear without bias, hooks, adapters or a sharded weight"
    if tuple(weight.shape) != (model.config.vocab_size, x.shape[-1]) or weight.device != x.device:
        return f"lm_head's weight is {tuple(weight.shape)} on {weight.device}"
    if dtype not in DTYPES or dtype == x.dtype != weight.dtype:
        return f"products are in {dtype}, hidden states in {x.dtype}, the head in {weight.dtype}"
    return ""


def _is_plain(head: Any) -> bool:
    """Whether `head(x)` is nothing but the product with a weight that is all here."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and type(head.weight) in (nn.Parameter, Tensor)
        and not head.weight.is_meta
        and "forward" not in vars(head)  # accelerate puts hooks there
        and not any(getattr(head, name) for name in hooks)
    )


class DeferredLogits:
    """Logits that are made when first used, by the head's weights of that moment.

    It takes part in torch's functions, has a tensor's methods, operators and indices; `shape`,
    `dtype`, `device`, `to` and `float` alone make nothing. `tensor()` gives what it stands for.
    """

    def __init__(
        self,
        make: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._make = make
        self._made: Any = None
        self.shape, self.dtype, self.device = shape, dtype, device

    @classmethod
    def of(cls, head: Any, hidden_states: Tensor) -> "DeferredLogits":
        """`head(hidden_states)`, under the autocast of now."""
        shape = torch.Size((*hidden_states.shape[:-1], head.weight.shape[0]))
        autocast = _current_autocast(hidden_states.device)

        def make() -> Tensor:
            with autocast():
                return head(hidden_states)

        return cls(make, shape, product_dtype(hidden_states), hidden_states.device)

    def tensor(self) -> Tensor:
        """The logits, with a gradient if it is recorded now; made once."""
        made = self._made
        if made is None or (torch.is_grad_enabled() and not made.requires_grad):
            self._made = made = self._make()
        return made

    def to(self, *args: Any, **kwargs: Any) -> "DeferredLogits":
        """As of a tensor, deferred too."""
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return DeferredLogits(
            lambda: self.tensor().to(*args, **kwargs), self.shape, like.dtype, like.device
        )

    def float(self) -> "DeferredLogits":
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask for such names of half-made objects
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files and copies have the logits themselves, without their graph."""
        return self.tensor().detach().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


def _current_autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _as_tensor(name: str) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return method


for _name in (
    *("getitem", "setitem", "len", "iter", "contains", "array", "bool", "neg", "pos", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "rmul", "matmul"),
    *("truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow"),
):
    setattr(DeferredLogits, f"__{_name}__", _as_tensor(f"__{_name}__"))

__all__ = [
    "DeferredLogits",
    "LossBackend",
    "causal_lm_loss",
    "linear_cross_entropy",
    "uses_fused_loss",
]
