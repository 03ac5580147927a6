"""Small models for tests. Every size differs from every other, so that a swapped axis fails."""

from typing import Any

import torch

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

PATTERNS = {
    "hybrid": [4],
    "all_kda": [],
    "all_mla": [1, 2, 3, 4],
    "alternating": [2, 4],
    "mla_first": [1],
}
# One layer of either kind of attention.
TWO_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "linear_attn_config": {
        "full_attn_layers": [2],
        "num_heads": 2,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}
# What scripts are given as a configuration's file.
SMALL_FIELDS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_attn_config": {"num_heads": 2, "head_dim": 16, "short_conv_kernel_size": 4},
    "num_experts": 4,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "model_max_length": 4096,
}


def tiny_config(pattern: str = "hybrid", **fields: Any) -> KimiLinearConfig:
    """Four layers: one dense, three with experts."""
    base = dict(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=52,
        num_hidden_layers=4,
        num_attention_heads=3,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=6,
        v_head_dim=14,
        linear_attn_config={
            "full_attn_layers": PATTERNS[pattern],
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        num_experts=6,
        num_experts_per_token=2,
        num_shared_experts=1,
        moe_intermediate_size=24,
        initializer_range=0.05,
        model_max_length=4096,
        pad_token_id=96,
        bos_token_id=94,
        eos_token_id=95,
    )
    return KimiLinearConfig(**{**base, **fields})


def tiny_model(pattern: str = "hybrid", seed: int = 0, **fields: Any) -> KimiLinearForCausalLM:
    """A float32 model in eval mode, with a correction bias that matters."""
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(tiny_config(pattern, **fields))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return model.eval()


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random ids without the special ones."""
    return torch.randint(0, 94, shape, generator=torch.Generator().manual_seed(seed))
