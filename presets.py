"""Named sizes for `KimiLinearConfig.from_preset`.

The `report-*` sizes are those of table 2 of arXiv 2510.26692 (activated parameters without
embeddings, heads, layers, hidden size; 8 of 64 experts). The report does not give the experts'
width: it is chosen here so that the activated parameters match. The small ones are ours, for
training on one CPU or one GPU; they keep the report's 3:1 pattern and end in an MLA layer. Names
with two numbers give total and activated parameters, the latter without embeddings.
"""

from typing import Any


def _preset(
    hidden_size: int,
    num_hidden_layers: int,
    num_heads: int,
    moe_intermediate_size: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    kda_head_dim: int = 128,
    kda_heads: int | None = None,
    mla_dims: tuple[int, int, int, int] = (512, 128, 64, 128),
    **fields: Any,
) -> dict[str, Any]:
    """Config fields of one size; `mla_dims` is (kv_lora_rank, qk_nope, qk_rope, v head sizes)."""
    kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = mla_dims
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_heads,
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": qk_nope_head_dim,
        "qk_rope_head_dim": qk_rope_head_dim,
        "v_head_dim": v_head_dim,
        "moe_intermediate_size": moe_intermediate_size,
        # one dense layer as wide as the experts that a token uses
        "intermediate_size": moe_intermediate_size * (num_experts_per_token + 1),
        "num_experts": num_experts,
        "num_experts_per_token": num_experts_per_token,
        "linear_attn_config": {
            "head_dim": kda_head_dim,
            "num_heads": kda_heads or num_heads,
            "short_conv_kernel_size": 4,
        },
        **fields,
    }


def _small(vocab_size: int, *args: Any, **fields: Any) -> dict[str, Any]:
    """A size of ours, whose 256 special tokens stand at the end of a vocabulary of `vocab_size`."""
    first = vocab_size - 256
    special: dict[str, Any] = {
        "bos_token_id": first,
        "eos_token_id": first + 1,
        "pad_token_id": vocab_size - 1,
    }
    fields |= special | {"vocab_size": vocab_size, "model_max_length": 32768}
    return _preset(*args, **fields)


PRESETS: dict[str, dict[str, Any]] = {
    "2m": _small(
        2048, 128, 4, 2, 64, 8, 2, kda_head_dim=32, kda_heads=4, mla_dims=(64, 32, 16, 32)
    ),
    "20m": _small(8192, 256, 8, 4, 128, 16, 4, kda_head_dim=64, mla_dims=(128, 64, 32, 64)),
    "300m": _small(32768, 768, 12, 6, 320, 24, 4, mla_dims=(256, 128, 64, 128)),
    "1b-a0.3b": _small(65536, 1024, 16, 8, 448, 40, 8),
    "report-653m": _preset(1216, 16, 16, 928, 64, 8),
    "report-878m": _preset(1376, 18, 18, 960, 64, 8),
    "report-1.1b": _preset(1536, 20, 20, 944, 64, 8),
    "report-1.4b": _preset(1632, 22, 22, 1024, 64, 8),
    "report-1.7b": _preset(1776, 24, 24, 1024, 64, 8),
    "48b-a3b": {},
}
