"""Extra forward arguments that Transformers and its trainers pass: who
reads each, or why it is dropped."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from kimi_linear.upstream.interfaces import ForCausalLMLoss
from kimi_linear.upstream.releases import versions

OUTPUT_ARGUMENTS = {
    "output_attentions": "capture_outputs",
    "output_hidden_states": "capture_outputs",
    "output_router_logits": "capture_outputs",
}
LENGTH_ARGUMENTS = {
    "cu_seq_lens_k": "dropped: DataCollatorWithFlattening's cu_seq_lens_q says it",
    "max_length_q": "dropped: DataCollatorWithFlattening's cu_seq_lens_q says it",
    "max_length_k": "dropped: DataCollatorWithFlattening's cu_seq_lens_q says it",
}
BACKBONE_ARGUMENTS = {
    **OUTPUT_ARGUMENTS,
    **LENGTH_ARGUMENTS,
    "logits_to_keep": "dropped: TRL's DistillationTrainer takes it from the head's signature",
    "num_items_in_batch": "dropped: Trainer's compute_loss_func divides by it",
}
# What the backbone hands to all layers beside hidden states and plan.
LAYER_ARGUMENTS = OUTPUT_ARGUMENTS
SHARED_ARGUMENTS = {
    **OUTPUT_ARGUMENTS,
    **LENGTH_ARGUMENTS,
    "num_items_in_batch": "the loss: of Trainer, with gradient accumulation",
    "skip_logits": "dropped: Trainer's evaluation asks Liger's kernels for it",
}
CAUSAL_LM_ARGUMENTS = {
    **SHARED_ARGUMENTS,
    "shift_labels": "the loss: of Trainer and accelerate, under sequence parallelism",
    "ignore_index": "the loss",
}
CLASSIFIER_ARGUMENTS = {
    **SHARED_ARGUMENTS,
    "margin": "dropped: TRL's RewardTrainer reads it itself",
}
# What a loss function is given by the model itself.
LOSS_INPUTS = {"logits", "labels", "vocab_size", "pooled_logits", "config"}


def loss_arguments(function: Callable[..., Any], given: dict[str, Any]) -> set[str]:
    """Those of the given names that a loss function reads."""
    parameters = inspect.signature(function).parameters.values()
    if function is not ForCausalLMLoss and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return set(given)
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - LOSS_INPUTS


def check_arguments(
    model: Any, given: dict[str, Any], known: dict[str, str], *, for_loss: bool = False
) -> None:
    """TypeError if a forward was given arguments that it does not know.

    Args:
        model: The module whose forward it is.
        given: What arrived in its `**kwargs`. Pipeline parallelism (5.17) binds the outer call's
            arguments and hands its `**kwargs` over under that name, `return_dict` included, which
            the outer call sees to: they are put where they belong.
        known: Names that are allowed there.
        for_loss: Whether those of the model's loss function are allowed too.
    """
    if "kwargs" in given:
        given.update(given.pop("kwargs"))
        given.pop("return_dict", None)
    unknown = given.keys() - known.keys()
    if unknown and for_loss:
        unknown -= loss_arguments(model.loss_function, given)
    if unknown:
        names = [*list(inspect.signature(type(model).forward).parameters)[1:-1], *known]
        names += ["return_dict"] if isinstance(model, PreTrainedModel) else []
        raise TypeError(
            f"{type(model).__name__}.forward() does not know {', '.join(sorted(unknown))}: its "
            f"arguments are {', '.join(names)} ({versions()})"
        )
