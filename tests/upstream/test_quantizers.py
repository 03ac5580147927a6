"""`upstream/quantizers.py`: what `HfQuantizer` is asked for, and who asks."""

import importlib
import inspect

import pytest
from touchpoints import CHANGED
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from kimi_linear import KimiLinearQuantizationConfig
from kimi_linear.upstream import quantizers

pytestmark = pytest.mark.core

METHODS = (
    "_dequantize",
    "get_state_dict_and_metadata",
    "_process_model_after_weight_loading",
    "_process_model_before_weight_loading",
    "is_serializable",
    "param_element_size",
    "postprocess_model",
    "preprocess_model",
    "validate_environment",
)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_quantisers(name):
    assert hasattr(HfQuantizer, name), f"HfQuantizer has no {name}: {CHANGED}"


def test_what_is_put_on_a_model_is_read_by_transformers():
    source = inspect.getsource(inspect.getmodule(PreTrainedModel))
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        assert name in source, f"modeling_utils has no {name}: {CHANGED}"


def test_a_quantiser_that_is_not_prequantised_loads_one_by_one():
    """Threads would read tensors ahead of those that are packed."""
    source = inspect.getsource(importlib.import_module("transformers.core_model_loading"))
    assert "not hf_quantizer.pre_quantized" in source, CHANGED


def test_the_name_is_registered_once_and_again():
    quantizers.register()
    quantizers.register()
    config = AutoQuantizationConfig.from_dict({"quant_method": "kimi_linear", "head": {"bits": 8}})
    assert isinstance(config, KimiLinearQuantizationConfig) and config.schemes["head"].bits == 8
    made = AutoHfQuantizer.from_config(config, pre_quantized=False)
    assert isinstance(made, quantizers.KimiLinearQuantizer) and made.is_trainable
    assert not made.pre_quantized


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        (KimiLinearQuantizationConfig(), "kimi_linear"),
    ],
)
def test_names_of_configurations(config, name):
    assert quantizers.quantization_name(config) == name


def test_a_checkpoints_configuration_is_read(tmp_path):
    config = PreTrainedConfig()
    config.save_pretrained(tmp_path)
    given = {"quantization_config": KimiLinearQuantizationConfig()}
    quantizers.check_quantized_once(tmp_path, given)
    quantizers.check_quantized_once(tmp_path / "nothing", given)  # left to Transformers
    quantizers.check_quantized_once(None, {**given, "config": config})
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    for path, more in ((tmp_path, {}), (None, {"config": config}), (None, {"config": tmp_path})):
        with pytest.raises(ValueError, match="of 'kimi_linear' is not allowed: .* by 'fp8'"):
            quantizers.check_quantized_once(path, {**given, **more})
    quantizers.check_quantized_once(tmp_path, {})
