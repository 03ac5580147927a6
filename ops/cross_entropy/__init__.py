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
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from kimi_linear.ops.cross_entropy.kernels import loss_and_gradient, reference_loss_and_gradient
from kimi_linear.ops.runtime import HOOKS, has_kernels, is_transformed, no_autocast
from kimi_linear.ops.wide_product import add_wide_product, wide_product
from kimi_linear.upstream.interfaces import ForCausalLMLoss
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

LossBackend = Literal["auto", "fused", "logits"]
# Logits of a chunk: 512 MB in float32.
CHUNK_ELEMENTS = 1 << 27
# The head's gradient is read and written once a chunk: small ones would do little else.
MIN_CHUNK_TOKENS = 64
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# Where "auto" takes it.
AUTO_DEVICES = ("cpu", "cuda")
# Of the head, by which a change is noticed.
SAMPLE_ELEMENTS = 4096
aten = torch.ops.aten


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
    return (
        type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and type(head.weight) in (nn.Parameter, Tensor)
        and not head.weight.is_meta
        and "forward" not in vars(head)  # accelerate puts hooks there
        and not any(getattr(head, name) for name in HOOKS)
    )


class DeferredLogits(Tensor):
    """Logits that are made when their numbers are first used, with their gradient.

    To autograd and to whoever asks for shape, dtype or device they are a tensor like any other.
    They are those of their forward pass: to make them after the head's weights have changed is an
    error.
    """

    values: "_Once"

    @staticmethod
    def __new__(
        cls, values: "_Once", shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> "DeferredLogits":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device
        )
        made.values = values
        return made

    @classmethod
    def of(cls, head: Any, hidden_states: Tensor) -> "DeferredLogits":
        """`head(hidden_states)` of a plain head, under the autocast of now."""
        return _DeferredLinear.apply(hidden_states, head.weight, product_dtype(hidden_states))

    @property
    def is_made(self) -> bool:
        return self.values.made is not None

    def tensor(self) -> Tensor:
        """The logits as a plain tensor."""
        return torch.ops.aten.alias(self)

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

    def make() -> Tensor:
        has_changed = versions != (x._version, weight_VD._version)
        is_gone = weight_VD.untyped_storage().size() == 0  # FSDP has divided it again
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
    """A copy of some numbers from all over the weight."""
    return weight.flatten()[:: max(1, weight.numel() // SAMPLE_ELEMENTS)].clone()


__all__ = [
    "DeferredLogits",
    "LossBackend",
    "causal_lm_loss",
    "linear_cross_entropy",
    "uses_fused_loss",
]
