"""Undocumented names of Transformers that are used as they are, and one that a config lacks."""

from typing import Any

from transformers import initialization as init  # skips what a checkpoint has filled
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.loss.loss_utils import ForCausalLMLoss  # the default `loss_function`
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


def attention_backend(config: Any) -> str:
    """What `attn_implementation` chose; "" before a model was made. `config` has no public name."""
    return config._attn_implementation or ""


def experts_backend(config: Any) -> str:
    """What `experts_implementation` chose; "" on a base class."""
    return getattr(config, "_experts_implementation", None) or ""


def is_flash(config: Any) -> bool:
    """Whether that is one of Transformers' flash attentions."""
    return "flash" in attention_backend(config)


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "ALL_PARALLEL_STYLES",
    "Concatenate",
    "ExpertsInterface",
    "ForCausalLMLoss",
    "GradientCheckpointingLayer",
    "MergeModulelist",
    "OutputRecorder",
    "TensorParallelLayer",
    "WeightConverter",
    "WeightRenaming",
    "attention_backend",
    "can_return_tuple",
    "capture_outputs",
    "create_causal_mask",
    "experts_backend",
    "init",
    "is_flash",
    "packed_sequence_mask_function",
    "register_checkpoint_conversion_mapping",
    "use_experts_implementation",
]
