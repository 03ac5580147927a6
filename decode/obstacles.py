"""What stands against the recorded step, and whether a model is still the one that was recorded."""

import gc
from operator import getitem, methodcaller
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import SILU_MODULES, power_of_two, product_dtype, triton
from kimi_linear.parallel.own_part import agreed, division_obstacle, own_part
from kimi_linear.parallel.tensor import is_dtensor
from kimi_linear.upstream.shared_memory import own_tensor

MAX_ROWS = 256
MAX_PAIRS = 2048  # of rows and experts
DEVICE_TYPES = ("cuda",)
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16)
PLAIN_MODULES = (nn.Linear, nn.Embedding, nn.ModuleList, *SILU_MODULES)
# fields whose values a recording contains
CONSTANTS = ("num_experts_per_token", "routed_scaling_factor", "moe_renormalize")
HELD = ("_parameters", "_buffers", "_modules")
address = methodcaller("data_ptr")


class Snapshot:
    """What a recording contains of a model. Checking whether it is current takes 60 us of host
    time for the 48B model, whether all of it is the same 1 ms; to look for obstacles takes 10 ms.

    Attributes:
        recorded: Addresses of parameters and buffers, and the configuration's constants.
    """

    def __init__(self, model: nn.Module) -> None:
        fields = [vars(module) for module in model.modules()]
        places = [
            (own[kind], name)
            for own in fields
            for kind in ("_parameters", "_buffers")
            for name, x in own[kind].items()
            if x is not None
        ]
        self._holders, self._names = zip(*places, strict=True)
        # where a tensor is one of several processes
        self._divided = [i for i, (own, name) in enumerate(places) if is_dtensor(own[name])]
        self._hooks = [own[x] for own in fields for x in ("_forward_hooks", "_forward_pre_hooks")]
        self._families = [own["_modules"] for own in fields if own["_modules"]]
        # the values of all these dicts; they never include the model itself, nor may other fields,
        # which keep it if it has a `forward` of its own
        self._modules = gc.get_referents(*self._families)
        self._fields = fields[1:]
        self.recorded = self._look(model)
        self._kinds = self._look_closely(model)

    @property
    def has_hooks(self) -> bool:
        """Whether a module has hooks now."""
        return any(self._hooks)

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model has the same modules, tensors in the same places, and constants."""
        try:
            return (
                self._look(model) == self.recorded
                and gc.get_referents(*self._families) == self._modules
            )
        except (KeyError, AttributeError):  # a tensor was taken out, or is not divided any more
            return False

    def is_same(self, model: nn.Module) -> bool:
        """Whether the model is current, and its modules and tensors are of the same kinds: the
        obstacles are those that were found before."""
        return self.is_current(model) and self._look_closely(model) == self._kinds

    def _look_closely(self, model: nn.Module) -> list[Any]:
        tensors: list[Any] = list(map(getitem, self._holders, self._names))
        held = [
            sum(x is not None for kind in HELD for x in own[kind].values())
            for own in (vars(model), *self._fields)
        ]
        kinds = [(type(x), x.dtype, x.device, x.stride()) for x in tensors]
        patched = ["forward" in own for own in self._fields]
        return [*map(type, self._modules), *held, *kinds, *patched, config_obstacle(model.config)]

    def _look(self, model: nn.Module) -> list[Any]:
        config = vars(model.config)  # its `getattr` takes ten times as long
        tensors: list[Any] = list(map(getitem, self._holders, self._names))
        for i in self._divided:
            tensors[i] = own_tensor(tensors[i])
        constants = [config[name] for name in CONSTANTS]
        return [*map(address, tensors), tensors[0].dtype, *constants]


class Part(NamedTuple):
    """What a process has of a model.

    Attributes:
        model: All of it, or the part of one that several processes have together.
        group: Those processes.
    """

    model: nn.Module
    group: Any = None


def examine_part(model: nn.Module) -> tuple[Part | None, str]:
    """This process' part of a model that several have together, and why it cannot decode by a
    `DecodeStep`, or ""; all processes find an obstacle, or none does."""
    if reason := division_obstacle(model):
        return None, reason
    part = Part(*own_part(model))
    device = next(part.model.parameters()).device
    return part, agreed(model_obstacle(part.model), part.group, device)


def call_obstacle(model: nn.Module, num_rows: int) -> str:
    """Why a call of `num_rows` rows cannot be a step though others of the model can, or ""."""
    config: Any = model.config
    backbone: Any = model.model
    count, used = len(backbone.layers), config.num_hidden_layers
    if count != used:  # an early exit
        return f"num_hidden_layers={used}, the model has {count}"
    width = config.num_experts_per_token or 1
    if num_rows > MAX_ROWS or num_rows * width > MAX_PAIRS:
        most = min(MAX_ROWS, MAX_PAIRS // width)
        return f"the batch has {num_rows} rows, the step takes up to {most}"
    weight = backbone.embed_tokens.weight
    if product_dtype(weight) != weight.dtype:
        return "autocast is on"
    if model.training and config.attention_dropout:
        return "attention_dropout is on"
    return ""


def model_obstacle(model: nn.Module) -> str:
    """Why this model cannot decode by a `DecodeStep`, or ""."""
    if triton is None:
        return "triton is not installed"
    device = next(model.parameters()).device
    if device.type not in DEVICE_TYPES:
        return f"the model is on {device.type!r}, it must be on one of {DEVICE_TYPES}"
    return chip_obstacle(device) or config_obstacle(model.config) or weight_obstacle(model)


def chip_obstacle(device: torch.device) -> str:
    """GPUs that the kernels are not made for."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return "this torch is not made for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU's compute capability {capability} is below {MIN_CAPABILITY}"
    return ""


def config_obstacle(config: Any) -> str:
    """Fields that the kernels are not made for."""
    linear = config.linear_attn_config
    powers = {
        "linear_attn_config.head_dim": linear["head_dim"],
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
    }
    for name, size in powers.items():
        if size < 16 or size != power_of_two(size):
            return f"{name}={size} is no power of two of at least 16"
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if getattr(config, name) % 8:
            return f"{name}={getattr(config, name)} is no multiple of 8"
    if config.q_lora_rank is not None:
        return f"q_lora_rank={config.q_lora_rank} is not None"
    if config.num_expert_group != config.topk_group:
        return f"num_expert_group={config.num_expert_group} is not topk_group={config.topk_group}"
    if type(ACT2FN[config.hidden_act]) not in SILU_MODULES:
        return f"hidden_act={config.hidden_act!r} is not 'silu'"
    if linear["short_conv_kernel_size"] < 2:
        return "linear_attn_config.short_conv_kernel_size is below 2"
    return ""


def weight_obstacle(model: nn.Module) -> str:
    """Weights that the kernels cannot read: adapters, sharded, spread, unaligned, others."""
    first = next(model.parameters())
    device, dtype = first.device, first.dtype
    if dtype not in DTYPES:
        return f"the weights are {dtype}, they must be one of {DTYPES}"
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in PLAIN_MODULES and not kind.__name__.startswith("KimiLinear"):
            return f"{name} is a {kind.__name__}"
        if isinstance(module, nn.Linear) and module.bias is not None:
            return f"{name} has a bias"
        if name and "forward" in vars(module):
            return f"{name} has a forward of its own"
        fused = [getattr(module, each, None) for each in ("gate_up_proj", "down_proj")]
        if len({isinstance(each, PackedWeights) for each in fused}) > 1:
            return f"{name} is packed in part"
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", "dt_bias"))
        parts: list[torch.Tensor] = [parameter]
        if isinstance(parameter, PackedWeights):
            parts = list(parameter.parts().values())
        elif type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
        if parameter.device != device:
            return f"{name} is on {parameter.device}, others are on {device}"
        if parameter.dtype != (torch.float32 if wide else dtype):
            return f"{name} is {parameter.dtype}, others are {dtype}"
        if not all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in parts):
            return f"{name} is not contiguous from a multiple of 16 bytes"
    return ""
