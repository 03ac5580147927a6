"""Kimi Linear for Hugging Face Transformers.

Importing the package registers its configuration and models with the Auto classes, in place of the
classes that Transformers itself has for `model_type="kimi_linear"`; those keep working.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from kimi_linear.cache.hybrid import KimiLinearCache, cache_memory
from kimi_linear.cache.sessions import (
    Session,
    keep_prefix,
    load_session,
    read_session,
    save_session,
)
from kimi_linear.checkpoints.engines import engine_problems
from kimi_linear.checkpoints.flat_copy import write_flat_copy
from kimi_linear.checkpoints.pretrained import AUTO_MAP, KimiLinearPreTrainedModel
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.modeling_kimi_linear import (
    KimiLinearBackbone,
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearForTokenClassification,
)
from kimi_linear.presets import PRESETS
from kimi_linear.quantization.packing import quantize_model
from kimi_linear.training.lora import LORA_GROUPS, lora_targets
from kimi_linear.upstream.remote_code import SavesCode

__version__ = "0.1.0"

# The package's modules stand in folders. Beside weights there is no room for these: a flat copy.
SavesCode.write_code, SavesCode.code_classes = staticmethod(write_flat_copy), AUTO_MAP

AutoConfig.register(KimiLinearConfig.model_type, KimiLinearConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, KimiLinearBackbone),
    (AutoModelForCausalLM, KimiLinearForCausalLM),
    (AutoModelForSequenceClassification, KimiLinearForSequenceClassification),
    (AutoModelForTokenClassification, KimiLinearForTokenClassification),
):
    _auto.register(KimiLinearConfig, _model, exist_ok=True)

__all__ = [
    "LORA_GROUPS",
    "PRESETS",
    "KimiLinearBackbone",
    "KimiLinearCache",
    "KimiLinearConfig",
    "KimiLinearForCausalLM",
    "KimiLinearForSequenceClassification",
    "KimiLinearForTokenClassification",
    "KimiLinearPreTrainedModel",
    "KimiLinearQuantizationConfig",
    "Session",
    "cache_memory",
    "engine_problems",
    "keep_prefix",
    "load_session",
    "lora_targets",
    "quantize_model",
    "read_session",
    "save_session",
]
