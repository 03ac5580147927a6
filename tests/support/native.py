"""Transformers' own Kimi Linear with the weights of a model of ours."""

import copy

import torch
from measuring.models import SHARED_FIELDS
from transformers.models.kimi_linear import modeling_kimi_linear as native_modeling
from transformers.models.kimi_linear.configuration_kimi_linear import (
    KimiLinearConfig as NativeConfig,
)


def native_like(model):
    """The native model with the weights of ours, matched by name and shape, not by its loader."""
    config = model.config
    linear = config.linear_attn_config
    native_config = NativeConfig(
        **{key: getattr(config, key) for key in SHARED_FIELDS},
        linear_attn_config=copy.deepcopy(linear),
    )
    native_config._attn_implementation = "eager"
    native = native_modeling.KimiLinearForCausalLM(native_config).eval()
    native.load_state_dict(dict(native_names(model.state_dict())))
    return native


def native_names(state):
    for name, tensor in state.items():
        if ".q_conv1d." in name:
            parts = [state[name.replace("q_conv1d", f"{x}_conv1d")] for x in "qkv"]
            yield name.replace("q_conv1d", "conv1d"), torch.cat(parts)
            continue
        if "k_conv1d" in name or "v_conv1d" in name:
            continue
        for gate in ("f_a_proj", "f_b_proj", "A_log", "dt_bias"):
            name = name.replace(f"self_attn.{gate}", f"self_attn.forget_gate.{gate}")
        yield name.replace("block_sparse_moe", "mlp"), tensor
