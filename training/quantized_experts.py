"""Quantises the routed experts while a checkpoint is read: adapters over a frozen base (QLoRA).

Transformers' bitsandbytes integration quantises linear layers. The routed experts, nearly all of
the parameters, are fused tensors that it leaves as they are; here they are quantised when they
arrive from the checkpoint, one at a time.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.ops.experts.quantized import QuantizedExperts, bitsandbytes
from kimi_linear.quantization.arrivals import replacing_arrivals
from kimi_linear.quantization.packing import EXPERT_TENSORS
from kimi_linear.upstream.quantizers import quantization_name


def quantizing_experts(
    model: nn.Module, config: Any, is_quantized_file: bool
) -> AbstractContextManager[None]:
    """While a checkpoint is read, quantise what arrives in the model's experts; nothing if `config`
    is None or another kind's.

    Args:
        model: The model, on the meta device.
        config: The quantisation's configuration.
        is_quantized_file: Whether the checkpoint's weights are quantised already.

    Raises:
        ValueError: For a checkpoint that is quantised already.
    """
    if quantization_name(config) != "bitsandbytes":
        return nullcontext()
    if is_quantized_file:
        raise ValueError(
            "quantization_config in the checkpoint is not allowed: bitsandbytes' layout has no "
            "place for fused experts; load the released weights, and quantise them while loading"
        )
    skipped = config.llm_int8_skip_modules or []
    experts = [
        module
        for name, module in model.named_modules()
        if isinstance(module, KimiLinearExperts) and not any(skip in name for skip in skipped)
    ]
    if config.load_in_4bit:
        _keep_linears_exact(model)
    tensors = dict.fromkeys(EXPERT_TENSORS, partial(_quantized, config=config))
    return replacing_arrivals(dict.fromkeys(experts, tensors))


def _keep_linears_exact(model: nn.Module) -> None:
    """Have linear layers in 4 bits compute the same on every CPU, whatever their size.

    On a CPU with AVX512-BF16, the first evaluation repacks a layer's weights for a kernel that
    refuses sizes, computes in bfloat16 whatever was asked for, and has no gradient: training after
    it goes wrong too. On a CPU with AVX512, weights whose rows are not whole blocks come back with
    scales of other blocks: such layers stay wide, on every device.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, bitsandbytes().nn.Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % module.weight.blocksize:
            sizes, has_bias = (module.in_features, module.out_features), module.bias is not None
            plain = nn.Linear(*sizes, has_bias, device="meta", dtype=module.weight.dtype)
            model.set_submodule(name, plain)


def _quantized(weights: Tensor, config: Any) -> nn.Parameter:
    if config.load_in_4bit:
        kind, is_double = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
        quantized = QuantizedExperts.of(weights, 4, kind, is_double)
    else:
        quantized = QuantizedExperts.of(weights, 8)
    return nn.Parameter(quantized, requires_grad=False)
