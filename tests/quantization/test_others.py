"""What `from_pretrained` says of quantisers that pass the routed experts by."""

import logging

import pytest
import torch
from few_bits_models import load_packed, mixed, write_small_model
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.quantization import others
from kimi_linear.upstream.models import mark_initialized

NAMES = ("linear layers", "experts too")


class Config(QuantizationConfigMixin):
    def __init__(self, quant_method=NAMES[0]):
        self.quant_method = quant_method


class Quantizer(HfQuantizer):
    """Makes the linear layers' weights integers, and by name the experts' too."""

    is_serializable = is_trainable = requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs): ...

    def _process_model_after_weight_loading(self, model, **kwargs): ...

    def param_needs_quantization(self, model, param_name, **kwargs):
        module = model.get_submodule(param_name.rpartition(".")[0])
        takes_experts = self.quantization_config.quant_method == NAMES[1]
        return isinstance(module, nn.Linear) or (
            takes_experts and isinstance(module, KimiLinearExperts)
        )

    def get_quantize_ops(self):
        return Integers()


class Integers:
    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, _, attribute = name.rpartition(".")
            parameter = nn.Parameter(value.to(torch.int8), requires_grad=False)
            mark_initialized(parameter)
            setattr(model.get_submodule(module), attribute, parameter)
            missing_keys.discard(name)
        return {}


for each in NAMES:
    register_quantization_config(each)(Config)
    register_quantizer(each)(Quantizer)


@pytest.fixture
def said(monkeypatch, caplog):
    """Texts of the warnings; each is said again."""
    others.logger.warning_once.cache_clear()
    monkeypatch.setattr(others.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=others.logger.name):
        yield lambda: [x.getMessage() for x in caplog.records if x.name == others.logger.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model"))


def test_experts_that_stay_wide_are_named_once(folder, said):
    for _ in range(2):
        model = KimiLinearForCausalLM.from_pretrained(
            folder, quantization_config=Config(), dtype=torch.bfloat16
        )
    assert model.lm_head.weight.dtype == torch.int8
    experts = [m for m in model.modules() if isinstance(m, KimiLinearExperts)]
    size = sum(p.nbytes for m in experts for p in m.parameters())
    total = sum(p.nbytes for p in model.parameters())
    assert said() == [
        f"quantization_config of 'linear layers' has left routed experts in torch.bfloat16: "
        f"{size / 1e9:.3g} of {total / 1e9:.3g} GB; KimiLinearQuantizationConfig packs them too"
    ]


def test_nothing_is_said_of_experts_that_are_quantised(folder, said):
    KimiLinearForCausalLM.from_pretrained(folder, quantization_config=Config(NAMES[1]))
    load_packed(folder, mixed())
    KimiLinearForCausalLM.from_pretrained(folder)
    assert said() == []
