"""Models whose weights are held in few bits, and the same models with these weights in full."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, KimiLinearQuantizationConfig
from kimi_linear.configuration_quantization import PARTS
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.training.lora import lora_targets

# What the 2m preset's sizes allow: 64 inputs of experts, 192 of the dense MLP.
SCHEMES: dict[str, dict[str, Any]] = {
    "3 bits": {"bits": 3, "group": 64},
    "3 bits, zeros": {"bits": 3, "group": 32, "is_symmetric": False},
    "4 bits": {"bits": 4, "group": 32},
    "4 bits, zeros": {"bits": 4, "group": 64, "is_symmetric": False},
    "8 bits": {"bits": 8, "group": 64},
    "8 bits a row": {"bits": 8, "group": None},
    "float8": {"bits": 8, "group": 64, "is_float": True},
    "float8 blocks": {"bits": 8, "group": 128, "is_float": True, "rows": 128},
}
# As the preset for 24 GB, with groups that fit.
MIXED: dict[str, Any] = {
    **dict.fromkeys(PARTS, {"bits": 8, "group": 64}),
    "experts": {"bits": 3, "group": 64},
}


def everywhere(scheme: str) -> KimiLinearQuantizationConfig:
    """All parts by one of `SCHEMES`."""
    return KimiLinearQuantizationConfig(**dict.fromkeys(PARTS, SCHEMES[scheme]))


def mixed(**parts: Any) -> KimiLinearQuantizationConfig:
    return KimiLinearQuantizationConfig(**{**MIXED, **parts})


def small_model(seed: int = 0, **fields: Any) -> KimiLinearForCausalLM:
    """The 2m preset, whose logits differ from token to token."""
    torch.manual_seed(seed)
    config = KimiLinearConfig.from_preset("2m", **{"initializer_range": 0.05, **fields})
    return KimiLinearForCausalLM(config).eval()


def write_small_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    small_model(**fields).to(dtype).save_pretrained(folder)
    return folder


def load_packed(folder: Path, config: Any, **kwargs: Any) -> KimiLinearForCausalLM:
    options = {"dtype": torch.float32, **kwargs}
    return KimiLinearForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def packed_of(model: nn.Module) -> dict[str, PackedWeights]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, PackedWeights)}


@torch.no_grad()
def in_full(model: KimiLinearForCausalLM, folder: Path) -> KimiLinearForCausalLM:
    """The model of the folder with the weights that a packed one computes with."""
    plain = KimiLinearForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    for name, weights in packed_of(model).items():
        plain.get_parameter(name).copy_(weights.dequantized())
    return plain


def adapt(model: Any, *groups: str) -> Any:
    """With adapters of rank 3 that change something, the same for models of the same names."""
    import peft

    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", **lora_targets(model.config, *groups))
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model
