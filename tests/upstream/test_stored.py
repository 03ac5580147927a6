"""`upstream/stored.py`: checkpoints' own quantisation on its way to this package's quantiser."""

import copy

import pytest
from builders import tiny_config
from touchpoints import CHANGED
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from kimi_linear import KimiLinearConfig
from kimi_linear.upstream import quantizers, stored

pytestmark = pytest.mark.core

ENTRY = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}


def config_with(entry):
    config = tiny_config()
    config.quantization_config = entry
    return config


def test_what_is_wrapped_finds_the_quantiser():
    quantizers.register()
    config = config_with(dict(ENTRY))
    stored.wrap_stored(config)
    assert AutoHfQuantizer.supports_quant_method(config.quantization_config), CHANGED
    found = AutoQuantizationConfig.from_dict(config.quantization_config)
    assert isinstance(found, stored.StoredQuantization), CHANGED
    assert found.to_dict() == ENTRY == dict(found)
    quantizer = AutoHfQuantizer.from_config(found, pre_quantized=True)
    assert isinstance(quantizer, quantizers.StoredQuantizer) and quantizer.is_trainable, CHANGED
    assert quantizers.quantization_name(found) == stored.STORED


def test_configurations_are_wrapped_while_a_model_is_loaded(tmp_path):
    """`PreTrainedConfig.from_pretrained` calls `from_dict`."""
    config_with(ENTRY).save_pretrained(tmp_path)
    with stored.wrapping_stored({}):
        wrapped, unused = KimiLinearConfig.from_pretrained(
            tmp_path, return_unused_kwargs=True, other=1
        )
        assert wrapped.quantization_config["quant_method"] == stored.STORED, CHANGED
        assert wrapped.quantization_config["stored"] == ENTRY and unused == {"other": 1}
    assert KimiLinearConfig.from_pretrained(tmp_path).quantization_config == ENTRY


def test_a_given_configuration_is_not_changed():
    given = config_with(copy.deepcopy(ENTRY))
    arguments = {"config": given}
    with stored.wrapping_stored(arguments):
        assert arguments["config"].quantization_config["stored"] == ENTRY
    assert given.quantization_config == ENTRY
    path = {"config": "somewhere"}
    with stored.wrapping_stored(path):
        assert path == {"config": "somewhere"}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"quant_method": "torchao"},
        {"quant_method": "kimi_linear"},
        {"load_in_4bit": True, "quant_method": "bitsandbytes"},
        {"load_in_8bit": True},
    ],
)
def test_what_others_read_is_left_to_them(entry):
    config = config_with(entry)
    stored.wrap_stored(config)
    assert config.quantization_config == entry
    assert stored.entry_of(config) is None


@pytest.mark.parametrize("method", ["awq", "gptq", "auto-round", "modelopt", None])
def test_what_nobody_reads_is_refused(method):
    message = f"quant_method={method!r} is not allowed: it must be one of compressed-tensors, fp8"
    with pytest.raises(ValueError, match=message):
        stored.wrap_stored(config_with({"quant_method": method}))


def test_a_configuration_without_an_entry():
    config = PreTrainedConfig()
    stored.wrap_stored(config)
    assert stored.entry_of(config) is None and not stored.is_described(None)
