"""What llama.cpp's converter is told of a model, so that llama.cpp computes the same.

llama.cpp has a head matrix, a shared expert in every layer with experts, and as many KDA heads as
MLA heads. A model without one of them gets it from zeros or from its embedding, which changes no
output. The rest that `engine_problems` knows of cannot be mended, and is refused.
"""

from dataclasses import dataclass
from typing import Any

from kimi_linear import KimiLinearConfig, engine_problems

ENGINE = "llama.cpp"
SHARED_EXPERT = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Plan:
    """Of one model.

    Attributes:
        config: What the file describes.
        fields: The same as `config.json` has it.
        zeros: Shapes of tensors that the file gets beyond the folder's, by the released names.
        padded: Axis and size to which tensors are filled up with zeros, by the released names.
        ties_head: Whether the head is the embedding.
        expert_groups: Groups of experts; 0 where they decide nothing.
        notes: What was mended, in sentences.
    """

    config: KimiLinearConfig
    fields: dict[str, Any]
    zeros: dict[str, tuple[int, ...]]
    padded: dict[str, tuple[int, int]]
    ties_head: bool
    expert_groups: int
    notes: list[str]


def make_plan(config: KimiLinearConfig, fields: dict[str, Any]) -> Plan:
    """Find what llama.cpp needs beyond the folder.

    Args:
        config: The folder's.
        fields: Of its `config.json`.

    Returns:
        The plan.

    Raises:
        ValueError: llama.cpp would refuse the model or compute something else, and zeros do not
            help; the message has every such field.
    """
    heads = _heads(config)
    has_zero_expert = not config.num_shared_experts and _expert_layers(config) != []
    groups = config.num_expert_group if config.topk_group < config.num_expert_group else 0
    changes: dict[str, Any] = {
        "tie_word_embeddings": False,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "linear_attn_config": {**fields["linear_attn_config"], "num_heads": heads},
        "num_shared_experts": config.num_shared_experts or 1,
    }
    mended = {**fields, **changes}
    # Groups are the one thing that llama.cpp has but its converter does not write.
    known = {**mended, "num_expert_group": 1, "topk_group": 1}
    problems = engine_problems(_config(known), ENGINE)
    if problems:
        raise ValueError(
            "llama.cpp does not compute this model: " + "; ".join(str(each) for each in problems)
        )
    padded = _padded(config, heads)
    notes = []
    if config.tie_word_embeddings:
        notes.append("tie_word_embeddings: the head is a copy of the embedding")
    if has_zero_expert:
        notes.append(f"num_shared_experts={config.num_shared_experts}: one of zeros is added")
    if padded:
        notes.append(
            f"{config.linear_attn_config['num_heads']} KDA heads and {config.num_attention_heads} "
            f"MLA heads: heads of zeros make them {heads} each"
        )
    return Plan(
        config=_config(mended),
        fields=mended,
        zeros=_zero_experts(config) if has_zero_expert else {},
        padded=padded,
        ties_head=config.tie_word_embeddings,
        expert_groups=groups if _expert_layers(config) else 0,
        notes=notes,
    )


def remarks(config: KimiLinearConfig) -> list[str]:
    """What is not the same in llama.cpp without being wrong for most uses, in sentences."""
    linear = config.linear_attn_config
    found = [
        "text with combining marks (Hindi, Thai, pointed Arabic, ...) is cut into other tokens by "
        "llama.cpp"
    ]
    if config.rms_norm_eps > 1e-5:
        found.append(
            f"rms_norm_eps={config.rms_norm_eps}: llama.cpp takes it for the latent's norm and for "
            "KDA's queries and keys too, not 1e-6"
        )
    if linear["head_dim"] not in (16, 32, 64, 128):
        found.append(
            f"KDA's head_dim={linear['head_dim']}: llama.cpp's CUDA kernels have 16, 32, 64, 128"
        )
    if linear["short_conv_kernel_size"] not in (3, 4):
        found.append(
            f"short_conv_kernel_size={linear['short_conv_kernel_size']}: llama.cpp's CUDA kernels "
            "have 3 and 4"
        )
    return found


def _config(fields: dict[str, Any]) -> KimiLinearConfig:
    return KimiLinearConfig.from_dict({k: v for k, v in fields.items() if k != "auto_map"})


def _heads(config: KimiLinearConfig) -> int:
    """Heads of each kind of layer in the file."""
    kinds = {"linear_attention": config.linear_attn_config["num_heads"]}
    kinds["full_attention"] = config.num_attention_heads
    return max(kinds[kind] for kind in config.layer_types)


def _expert_layers(config: KimiLinearConfig) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]


def _zero_experts(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    """A shared expert for each layer with experts."""
    inner, outer = config.moe_intermediate_size, config.hidden_size
    return {
        f"model.layers.{index}.block_sparse_moe.shared_experts.{name}.weight": (
            (outer, inner) if name == "down_proj" else (inner, outer)
        )
        for index in _expert_layers(config)
        for name in SHARED_EXPERT
    }


def _padded(config: KimiLinearConfig, heads: int) -> dict[str, tuple[int, int]]:
    """Tensors with a part for each head, of the kind of layer that has fewer heads."""
    size = config.linear_attn_config["head_dim"]
    rows = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "f_b_proj.weight", "g_b_proj.weight")
    convolutions = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")
    kda = dict.fromkeys((*rows, *convolutions, "dt_bias"), (0, size))
    kda |= {"b_proj.weight": (0, 1), "A_log": (2, 1), "o_proj.weight": (1, size)}
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    mla = {
        "q_proj.weight": (0, nope + config.qk_rope_head_dim),
        "kv_b_proj.weight": (0, nope + value),
        "o_proj.weight": (1, value),
    }
    parts = {
        "linear_attention": (config.linear_attn_config["num_heads"], kda),
        "full_attention": (config.num_attention_heads, mla),
    }
    found = {}
    for index, kind in enumerate(config.layer_types):
        count, tensors = parts[kind]
        for name, (axis, each) in tensors.items() if count < heads else ():
            found[f"model.layers.{index}.self_attn.{name}"] = (axis, heads * each)
    return found
