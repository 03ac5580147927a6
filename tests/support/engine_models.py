"""Small models for other engines: every tensor matters, and so does every field."""

from pathlib import Path
from typing import Any

import torch

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.tokenizer import convert_tiktoken
from kimi_linear.tokenizer.special_tokens import NUM_SPECIAL_TOKENS

LINEAR = {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}
# As many MLA heads as KDA heads.
HEADS = {"num_attention_heads": 4}
RANKS = {bytes([i]): i for i in range(256)} | {
    pair: 256 + i for i, pair in enumerate([b"th", b"in", b"er", b"an", b" t"])
}
# What every engine should compute as this package does, beside the preset itself.
FIELDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rms_norm_eps of 1e-5": {"rms_norm_eps": 1e-5},
    "softmax": {"moe_router_activation_func": "softmax"},
    "one expert group": {"num_expert_group": 2, "topk_group": 2},
    "factor 1": {"routed_scaling_factor": 1.0},
    "two shared experts": {"num_shared_experts": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "all dense": {"first_k_dense_replace": 4},
    "all experts": {"num_experts_per_token": 8},
    "no shared part of the key": {"qk_rope_head_dim": 0},
    "values unlike keys": {"qk_nope_head_dim": 24, "v_head_dim": 16, "kv_lora_rank": 48},
    "three heads": {"num_attention_heads": 3, "linear_attn_config": {**LINEAR, "num_heads": 3}},
    "KDA heads of 64": {"linear_attn_config": {**LINEAR, "head_dim": 64}},
    "KDA heads of 128": {"linear_attn_config": {**LINEAR, "head_dim": 128, "num_heads": 2}}
    | {"num_attention_heads": 2},
    "convolution of 3": {"linear_attn_config": {**LINEAR, "short_conv_kernel_size": 3}},
    "a KDA layer last": {"linear_attn_config": {**LINEAR, "full_attn_layers": [2]}},
    "an MLA layer first": {"linear_attn_config": {**LINEAR, "full_attn_layers": [1, 3]}},
    "sizes of no block": {"hidden_size": 72, "moe_intermediate_size": 40},
}


def small_config(**fields: Any) -> KimiLinearConfig:
    # Norms that take 1e-6 here take `rms_norm_eps` elsewhere.
    fields = {**_ids(RANKS), "initializer_range": 0.1, "rms_norm_eps": 1e-6, **HEADS, **fields}
    return KimiLinearConfig.from_preset("2m", **fields)


def _ids(ranks: dict[bytes, int]) -> dict[str, int]:
    first, total = len(ranks), len(ranks) + NUM_SPECIAL_TOKENS
    special = {"bos_token_id": first, "eos_token_id": first + 1, "pad_token_id": total - 1}
    return {"vocab_size": total, **special}


def write_engine_model(
    folder: Path, *, ranks: dict[bytes, int] = RANKS, shift: float = 0.0, **fields: Any
) -> Path:
    """A folder with model and tokenizer.

    Args:
        folder: To make.
        ranks: Of the vocabulary.
        shift: What the routers' correction biases are around.
        **fields: Of the configuration.
    """
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(small_config(**{**_ids(ranks), **fields})).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(shift, 0.3)
            elif "norm" in name:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
            elif name.endswith("dt_bias"):
                tensor.normal_()
            elif name.endswith("A_log"):
                tensor.uniform_(0, 2)
    model.save_pretrained(folder)
    convert_tiktoken(ranks, folder)
    return folder
