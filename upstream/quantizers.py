"""Transformers' quantisers: how `quantization_config=` of this package reaches a model.

`HfQuantizer`'s methods are not documented; all of these have been there since 5.17. Registration is
documented, but takes a name once. What is done to a model, its class does: the installed package
and code beside weights register in one process, and the quantiser of one serves models of both.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from kimi_linear.configuration_quantization import QUANT_METHOD, KimiLinearQuantizationConfig
from kimi_linear.upstream.stored import STORED, StoredQuantization

# Arguments of `from_pretrained` that say where a configuration is.
PLACES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class KimiLinearQuantizer(HfQuantizer):
    """Has a model's class do what the base class calls these methods for."""

    requires_calibration = False
    is_trainable = True  # adapters over it

    def is_serializable(self) -> bool:
        """`save_pretrained` of the models says what can be saved."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called with the map that was asked for, and again with what "auto" became."""
        for name, is_on in (("ZeRO-3", is_deepspeed_zero3_enabled()), ("FSDP", is_fsdp_enabled())):
            if is_on:
                raise ValueError(
                    f"{name} is not allowed with quantization_config of {QUANT_METHOD!r}: packed "
                    "weights cannot be divided among processes"
                )
        places = {str(x) for x in device_map.values()} if isinstance(device_map, Mapping) else set()
        offloaded = places & {"disk"} or (places & {"cpu"} if len(places) > 1 else set())
        if offloaded:
            raise ValueError(
                f"device_map with {offloaded.pop()!r} beside other devices is not allowed with "
                f"quantization_config of {QUANT_METHOD!r}: packed weights are not offloaded; all "
                "of it must be on one kind of device"
            )

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes that a number takes, by which `device_map="auto"` counts."""
        scheme = self.quantization_config.scheme_of(param_name.rpartition(".")[0])
        if scheme is None:
            return param.element_size()
        return scheme.bits_per_weight(8 * param.element_size()) / 8

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict]:
        """What `save_pretrained(state_dict=...)` was given, which it replaces by this."""
        return given_state.get(), {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not hasattr(model, "check_quantization"):
            raise ValueError(
                f"quantization_config of {QUANT_METHOD!r} is not allowed with "
                f"{type(model).__name__}: it is for Kimi Linear models of this package"
            )
        model.check_quantization(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            model.finish_quantization(self.quantization_config)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return model  # its own `dequantize` does it


class StoredQuantizer(KimiLinearQuantizer):
    """Of checkpoints that are quantised already, which the model's class reads."""

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        return model.stored_element_size(self.quantization_config.stored, param_name, param)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Nothing: files are checked when they are read."""


# What `save_pretrained(state_dict=...)` is given.
given_state: ContextVar[dict[str, Tensor] | None] = ContextVar(
    "kimi_linear_given_state", default=None
)


def register() -> None:
    """Make `quantization_config=` take this package's configuration, as an object, a dict, or a
    checkpoint's. Another copy of this code may have registered before."""
    pairs = {
        QUANT_METHOD: (KimiLinearQuantizationConfig, KimiLinearQuantizer),
        STORED: (StoredQuantization, StoredQuantizer),
    }
    for method, (config, quantizer) in pairs.items():
        for registered in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
            registered.pop(method, None)
        register_quantization_config(method)(config)
        register_quantizer(method)(quantizer)


def quantization_name(config: Any) -> str | None:
    """`quant_method` of a configuration, object or dict; None without one."""
    if isinstance(config, Mapping):
        method = config.get("quant_method")
        if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
            return "bitsandbytes"
    else:
        method = getattr(config, "quant_method", None)
    return getattr(method, "value", method)


def make_quantized(model: Any, config: KimiLinearQuantizationConfig) -> None:
    """Quantise a model in memory, which then is as `from_pretrained` makes it."""
    quantizer = KimiLinearQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def check_quantized_once(model: Any, kwargs: dict[str, Any]) -> None:
    """Whether `from_pretrained(model, **kwargs)` asks to quantise what is quantised: Transformers
    goes on with the checkpoint's configuration then.

    Raises:
        ValueError: It does; the message names both.
    """
    given = quantization_name(kwargs.get("quantization_config"))
    if given is None:
        return
    config = kwargs.get("config") or model
    if not isinstance(config, PreTrainedConfig):
        wanted = {name: kwargs[name] for name in PLACES if name in kwargs}
        try:
            fields, _ = PreTrainedConfig.get_config_dict(config, **wanted)
        except OSError:  # an adapter's folder, or none: Transformers finds out
            return
        found = quantization_name(fields.get("quantization_config"))
    else:
        found = quantization_name(getattr(config, "quantization_config", None))
    if found is not None:
        raise ValueError(
            f"quantization_config of {given!r} is not allowed: {model} is quantised already, by "
            f"{found!r}; leave the argument out, or load weights in 16 bits"
        )
