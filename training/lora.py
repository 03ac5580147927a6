"""What LoRA can be put on, by part of the model, as PEFT's `LoraConfig` takes it.

    LoraConfig(r=16, lora_alpha=32, **lora_targets(model.config, "attention", "experts"))

Linear layers are `target_modules`. The routed experts are two fused tensors, `gate_up_proj`
[E, 2I, D] and `down_proj` [E, D, I], and so are `target_parameters`: PEFT gives each of the E
experts factors of its own, of the rank that is asked for. KDA and MLA layers share names (`q_proj`,
`o_proj`), hence the layers' numbers where only one kind is wanted.

Left out on purpose: the router, whose choice must not move in fine-tuning, norms, convolutions,
`A_log` and `dt_bias`, which are small and trained as they are or not at all, and `lm_head`.
"""

from typing import Any

KDA_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "b_proj", "o_proj"),
    *("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"),
)
# `q_a_proj` and `q_b_proj` take the place of `q_proj` where the config has a `q_lora_rank`.
MLA_PROJECTIONS = (
    *("q_proj", "q_a_proj", "q_b_proj"),
    *("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
)
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE_MLP_MODULES = tuple(f"mlp.{name}" for name in MLP_PROJECTIONS)
SHARED_EXPERT_MODULES = tuple(f"shared_experts.{name}" for name in MLP_PROJECTIONS)
EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
# "attention" is "kda" and "mla"; "all" is everything.
LORA_GROUPS = ("attention", "kda", "mla", "dense", "shared", "experts", "all")


def lora_targets(config: Any, *groups: str) -> dict[str, list[str]]:
    """`target_modules` and `target_parameters` for parts of a model.

    Args:
        config: The model's configuration.
        *groups: Of `LORA_GROUPS`.

    Returns:
        Keywords for PEFT's `LoraConfig`; either list may be empty. Every entry is there in the
        model.

    Raises:
        ValueError: For no group, an unknown one, or one that this model has nothing of.
    """
    if not groups:
        raise ValueError(f"groups are missing; allowed: some of {LORA_GROUPS}")
    for group in groups:
        if group not in LORA_GROUPS:
            raise ValueError(f"group {group!r} is not allowed: it must be one of {LORA_GROUPS}")
    parts = _parts(config)
    wanted: dict[str, None] = {}
    for group in groups:
        names = {"attention": ("kda", "mla"), "all": tuple(parts)}.get(group, (group,))
        found = [entry for name in names for entry in parts[name]]
        if not found:
            raise ValueError(f"group {group!r} is not allowed: this model has no such part")
        wanted |= dict.fromkeys(found)
    parameters = [entry for entry in wanted if entry in EXPERT_PARAMETERS]
    modules = [entry for entry in wanted if entry not in EXPERT_PARAMETERS]
    return {"target_modules": modules, "target_parameters": parameters}


def _parts(config: Any) -> dict[str, list[str]]:
    """What the model has, by the groups that are no union of others."""
    kinds = config.layer_types
    absent = ("q_a_proj", "q_b_proj") if config.q_lora_rank is None else ("q_proj",)
    is_moe = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    return {
        "kda": _in_layers(kinds, "linear_attention", KDA_PROJECTIONS),
        "mla": _in_layers(
            kinds, "full_attention", [name for name in MLA_PROJECTIONS if name not in absent]
        ),
        "dense": [] if all(is_moe) else list(DENSE_MLP_MODULES),
        "shared": list(SHARED_EXPERT_MODULES) if any(is_moe) and config.num_shared_experts else [],
        "experts": list(EXPERT_PARAMETERS) if any(is_moe) else [],
    }


def _in_layers(kinds: list[str], kind: str, names: Any) -> list[str]:
    layers = [layer for layer, found in enumerate(kinds) if found == kind]
    return [f"layers.{layer}.self_attn.{name}" for layer in layers for name in names]
