"""The two models that `benchmark.py` compares, from one configuration and with the same weights."""

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kimi_linear import KimiLinearCache, KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.cache.kda import ROLLBACK_TOKENS
from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.parallel.tensor import is_dtensor
from kimi_linear.upstream.models import divided
from measuring.packed import fill_packed, put_packed

MODELS = ("ours", "native")
WEIGHT_STD = 0.02
NATIVE_MODULE = "transformers.models.kimi_linear.modeling_kimi_linear"
# The fields that Transformers' own configuration knows too, under these or their older names.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "routed_scaling_factor",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "topk_group",
    "num_experts",
    "num_shared_experts",
    "num_experts_per_token",
    "num_expert_group",
    "moe_renormalize",
    "first_k_dense_replace",
)


def build(
    kind: str,
    config: KimiLinearConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: KimiLinearQuantizationConfig | None = None,
) -> PreTrainedModel:
    """A model in eval mode with random weights, made on the device.

    Both kinds get the same weights: each tensor is drawn from a seed that is its official name's.
    Packed weights are other ones, of the same size: they are drawn as they are held.

    Args:
        kind: One of `MODELS`.
        config: Of ours; the native model's is made from it.
        device, dtype: Of the weights; the decay parameters of ours stay in float32.
        quantization: Which parts of ours are packed, and how.
    """
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config) if kind == "ours" else _native_model(config, device)
        model = model.to(dtype)
    if quantization is None:
        model = model.to_empty(device=device)
    else:
        put_packed(model, quantization, device)
        _to_empty(model, device)
    model = model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, PackedWeights):
                fill_packed(name, parameter, WEIGHT_STD)
                continue
            for official_name, part in official_parts(name, parameter):
                _fill(official_name, part)
        for buffer in model.buffers():
            buffer.zero_()
    return _without_end(model)


def build_divided(
    config: KimiLinearConfig, num_processes: int, *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """As `build`, with the same weights, divided among torchrun's processes (tensor parallelism).

    Each process draws one whole tensor at a time, and keeps its part.
    """
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config).to(dtype)
    model = divided(model, num_processes)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    for official_name, part in official_parts(f"{module_name}.{name}", made):
                        _fill(official_name, part)
                    module._parameters[name] = nn.Parameter(_part(made, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.zeros_like(buffer, device=device)
    return _without_end(model.eval())


def _part(whole: Tensor, like: Any) -> Tensor:
    """What a process has of `whole`, as the parameter in whose place it comes."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor

    mesh, (place,) = like.device_mesh, like.placements
    dim, pieces = place.dim % whole.ndim, getattr(place, "split_factor", 1)
    cut = whole.unflatten(dim, (pieces, mesh.size(), -1)).select(dim + 1, mesh.get_local_rank())
    options: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    part = cut.flatten(dim, dim + 1).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(part, mesh, like.placements, **options)


def _without_end(model: PreTrainedModel) -> PreTrainedModel:
    """A benchmark counts tokens: no text may end early."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _to_empty(model: PreTrainedModel, device: torch.device) -> None:
    """As `to_empty`, of what is on the meta device only; packed weights are made already."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty_like(parameter, device=device)
                setattr(module, name, nn.Parameter(made, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))


def new_cache(kind: str, config: Any, reserve_tokens: int, *, can_crop: bool = True) -> Cache:
    """An empty cache: ours with room for so many tokens, as far as they are known beforehand."""
    if kind == "native":
        return DynamicCache(config=config)
    rollback_tokens = ROLLBACK_TOKENS if can_crop else 0
    return KimiLinearCache(config, reserve_tokens=reserve_tokens, rollback_tokens=rollback_tokens)


def _native_model(config: KimiLinearConfig, device: torch.device) -> PreTrainedModel:
    if config.moe_layer_freq != 1:
        raise ValueError(
            f"moe_layer_freq={config.moe_layer_freq} is not allowed: the native model knows 1 only"
        )
    module = native_module(device)
    native_config = module.KimiLinearConfig(
        **{field: getattr(config, field) for field in SHARED_FIELDS},
        linear_attn_config=dict(config.linear_attn_config),
        attn_implementation="sdpa",
    )
    return module.KimiLinearForCausalLM(native_config)


def native_module(device: torch.device) -> Any:
    """Transformers' module, bound to its torch operators where there is no GPU.

    It binds its operators when it is imported, to FLA's if there is such a package, and then calls
    them whatever the device: on a CPU they fail.
    """
    is_hidden = device.type == "cpu" and importlib.util.find_spec("fla") is not None
    if not is_hidden or "fla" in sys.modules or NATIVE_MODULE in sys.modules:
        return importlib.import_module(NATIVE_MODULE)
    sys.modules["fla"] = None  # type: ignore[assignment]  # an import fails
    try:
        return importlib.import_module(NATIVE_MODULE)
    finally:
        del sys.modules["fla"]


def official_parts(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its official name; the native model has three convolutions in one."""
    name = name.replace("forget_gate.", "").replace("block_sparse_moe", "mlp")
    if ".conv1d." not in name:
        yield name, parameter
        return
    for letter, part in zip("qkv", parameter.chunk(3), strict=True):
        yield name.replace("conv1d", f"{letter}_conv1d"), part


def _fill(name: str, part: Tensor) -> None:
    """Values of the size that a trained model's have, so that decays and states stay in range."""
    if "norm" in name:
        part.fill_(1)
        return
    generator = torch.Generator(part.device).manual_seed(zlib.crc32(name.encode()))
    if name.endswith("A_log"):
        part.uniform_(0, 2.7, generator=generator)
    elif name.endswith("dt_bias"):
        part.uniform_(-6, -2, generator=generator)
    else:
        part.normal_(0, WEIGHT_STD, generator=generator)
