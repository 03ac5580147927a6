"""What a language model's loss is, and the logits beside it.

Labels are shifted within their sequences. The cross entropy is computed from logits, or in training
without them. The router's losses are added, and under context parallelism the processes' sum is
taken.

Shapes: B batch, T tokens, S tokens of cache and call, D hidden size, V vocabulary.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.inputs.checks import unless_all_real
from kimi_linear.inputs.layout import SequenceLayout, last_real_columns, sequence_layout
from kimi_linear.ops.cross_entropy import linear_cross_entropy
from kimi_linear.ops.runtime import is_transformed, linear_weight, product_dtype
from kimi_linear.outputs_kimi_linear import KimiLinearModelOutput
from kimi_linear.training.deferred_logits import DeferredLogits
from kimi_linear.training.router_losses import add_router_losses
from kimi_linear.upstream.interfaces import ForCausalLMLoss

LossBackend = Literal["auto", "fused", "logits"]
IGNORED = -100  # the label of tokens without a loss
AUTO_DEVICES = ("cpu", "cuda")  # where "auto" takes the fused loss
FUSED_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def loss_and_logits(
    model: Any,
    outputs: KimiLinearModelOutput,
    inputs: dict[str, Any],
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    loss_kwargs: dict[str, Any],
) -> tuple[Tensor | None, Tensor]:
    """The loss of a causal language model, None without labels, and its logits.

    Args:
        model: `KimiLinearForCausalLM`.
        outputs: its backbone's.
        inputs: what the backbone was given, by its arguments' names.
        labels, logits_to_keep: as the model's forward has them.
        loss_kwargs: arguments of the loss function.

    Raises:
        ValueError: for an unknown `model.loss_backend`, or "fused" in training where it is not
            possible; for labels of another shape, and `logits_to_keep` beside labels.
    """
    x, planner = outputs.last_hidden_state, model.model.planner
    assert x is not None
    if model.loss_backend not in get_args(LossBackend):
        raise ValueError(
            f"loss_backend={model.loss_backend!r} is not allowed: it must be one of "
            f"{get_args(LossBackend)}"
        )
    if labels is None:
        return None, model.lm_head(_kept_states(x, logits_to_keep, inputs["attention_mask"]))
    keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
    if keeps_all and planner.has_all_tokens and labels.shape != x.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, which is not allowed: it must be "
            f"[batch, tokens] = {list(x.shape[:2])}"
        )
    boundaries = {name: inputs[name] for name in ("attention_mask", "position_ids", "seq_idx")}
    boundaries["cu_seq_lens"] = inputs["cu_seq_lens_q"]
    layout = sequence_layout(*labels.shape, **boundaries, device=labels.device)
    if not layout.is_plain:
        ignored = loss_kwargs.get("ignore_index", IGNORED)
        loss_kwargs = {"shift_labels": _next_labels(labels, layout, ignored), **loss_kwargs}
    labels, loss_kwargs = planner.own_labels(labels, loss_kwargs)
    loss, logits = _whole_loss(model, outputs, labels, logits_to_keep, loss_kwargs)
    return planner.total(loss), logits


def _whole_loss(
    model: Any,
    outputs: KimiLinearModelOutput,
    labels: Tensor,
    logits_to_keep: int | Tensor,
    loss_kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Cross entropy and router's losses of this process' labels, and the logits [B, T, V]."""
    x: Any = outputs.last_hidden_state
    num_items_in_batch = loss_kwargs.get("num_items_in_batch")
    ignored, shifted = loss_kwargs.get("ignore_index", IGNORED), loss_kwargs.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels[:, 1:], (0, 1), value=ignored)
    if _is_fused(model, x, labels, logits_to_keep):
        logits: Tensor = DeferredLogits.of(model.lm_head, x)
        loss = linear_cross_entropy(
            x.flatten(0, -2),
            model.lm_head.weight,
            shifted.flatten().to(x.device),
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignored,
        )
    else:
        kept = _kept_states(x, logits_to_keep)
        if kept.shape[:2] != labels.shape:
            raise ValueError(
                f"logits_to_keep={logits_to_keep!r} is not allowed with labels: it must be 0"
            )
        logits = model.lm_head(kept)
        loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.vocab_size, **loss_kwargs
        )
    counts = shifted != ignored
    loss = add_router_losses(
        model, loss, outputs.router_losses_by_place, counts, num_items_in_batch
    )
    return loss, logits


def _kept_states(
    x: Tensor, logits_to_keep: int | Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """The hidden states [B, kept, D] whose logits are wanted. With a mask [B, S], padding has those
    of the row's last real token before it, whose logits say how the row goes on."""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    mask = attention_mask
    if mask is not None:
        mask = unless_all_real(mask) if mask.ndim == 2 and x.shape[1] > 1 else None
    if mask is None:
        return x[:, kept, :]
    columns = last_real_columns(mask[:, -x.shape[1] :].to(x.device) != 0)[:, kept]
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _next_labels(labels: Tensor, layout: SequenceLayout, ignored: int) -> Tensor:
    """[B, T]: at each real token the label of the next one of its sequence, `ignored` elsewhere."""
    following = F.pad(layout.pack(labels)[:, 1:], (0, 1), value=ignored)
    if layout.order is not None:
        following = following.masked_fill(layout.is_behind(labels).roll(-1, 1), ignored)
    else:
        assert layout.cu_seqlens is not None
        ends = layout.cu_seqlens[1:].long()
        following[:, ends[ends > 0] - 1] = ignored
    # `unpack` writes zeros at padding
    return layout.unpack(following - ignored, labels.shape[0]) + ignored


def _is_fused(model: Any, x: Tensor, labels: Tensor, logits_to_keep: int | Tensor) -> bool:
    """Whether the loss of this call is computed without its logits. ValueError if the model's
    `loss_backend` is "fused" and this is training where that is not possible."""
    backend = model.loss_backend
    if backend == "logits" or not (model.training and torch.is_grad_enabled()):
        return False
    if backend == "auto" and x.device.type not in AUTO_DEVICES:
        return False
    obstacle = _obstacle(model, x, labels, logits_to_keep)
    if obstacle and backend == "fused":
        raise ValueError(
            f"loss_backend='fused' is not possible here: {obstacle}; allowed are 'auto' and "
            "'logits'"
        )
    return not obstacle


def _obstacle(model: Any, x: Tensor, labels: Tensor, logits_to_keep: int | Tensor) -> str:
    """Why the logits are needed, or "". Wrong arguments are named elsewhere."""
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
    dtype, weight = product_dtype(x), linear_weight(model.lm_head)
    if weight is None:
        return "lm_head is not a plain nn.Linear without bias, hooks, adapters or a sharded weight"
    if tuple(weight.shape) != (model.config.vocab_size, x.shape[-1]) or weight.device != x.device:
        return f"lm_head's weight is {tuple(weight.shape)} on {weight.device}"
    if dtype not in FUSED_DTYPES or dtype == x.dtype != weight.dtype:
        return f"products are in {dtype}, hidden states in {x.dtype}, the head in {weight.dtype}"
    return ""


# ------------------------------------------------------------------------------------- classifiers
def sequence_label_loss(
    model: Any,
    outputs: KimiLinearModelOutput,
    logits: Tensor,
    read: Tensor,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor | None:
    """The loss of `KimiLinearForSequenceClassification`, None without labels.

    Args:
        logits: [B, T, classes].
        read: [B] int64, the token whose logits are the sequence's.
        labels: as the model's forward has them.
        num_items_in_batch: what the sum of losses is divided by, where Trainer counts it.
    """
    if labels is None:
        return None
    rows = torch.arange(logits.shape[0], device=logits.device)
    loss = model.loss_function(
        logits=logits,
        labels=labels,
        pooled_logits=logits[rows, read],
        config=model.config,
        num_items_in_batch=num_items_in_batch,
    )
    if (
        num_items_in_batch is not None
        and model.config.problem_type != "single_label_classification"
    ):
        loss = (
            loss * labels.numel() / num_items_in_batch
        )  # a mean: a step wants its share of all labels
    counts = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    counts[rows, read] = (labels != IGNORED).view(len(rows), -1).sum(1).to(logits.device)
    return add_router_losses(
        model, loss, outputs.router_losses_by_place, counts, num_items_in_batch
    )


def token_label_loss(
    model: Any,
    outputs: KimiLinearModelOutput,
    logits: Tensor,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor | None:
    """The loss of `KimiLinearForTokenClassification` for logits [B, T, classes] and labels [B, T],
    None without labels; `num_items_in_batch` as in `sequence_label_loss`."""
    if labels is None:
        return None
    loss = model.loss_function(logits, labels, model.config, num_items_in_batch=num_items_in_batch)
    counts = labels != IGNORED
    return add_router_losses(
        model, loss, outputs.router_losses_by_place, counts, num_items_in_batch
    )
