"""What each field of a configuration may be: a table of single fields, then what two say together.

Every error is a ValueError in one line, with the field, its value and what is allowed.
"""

import difflib
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Beyond any model; a file with more is broken, and would take all memory before that shows.
MAX_SIZE = 2**31 - 1
MAX_LAYERS, MAX_EXPERTS, MAX_LABELS = 10_000, 100_000, 10_000_000
# Characters of a value in a message.
MAX_SHOWN = 240
# Float32's largest: what is beyond becomes infinite in the computation.
MAX_NUMBER = 3.4028234663852886e38
# FLA's KDA kernels hold one head's keys in one block of at most 256 channels; a tile is 16 wide.
MIN_KDA_HEAD_DIM, MAX_KDA_HEAD_DIM = 16, 256

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
LAYER_LISTS = ("kda_layers", "full_attn_layers")
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Fields of related architectures that would change the computation. They are refused, not ignored.
UNSUPPORTED_FIELDS = {
    "attention_bias": "biases of MLA layers in Transformers' own class",
    "activation_situ_beta": "Kimi K3's activation",
    "activation_situ_linear_beta": "Kimi K3's activation",
    "attn_res_block_size": "Kimi K3's attention residuals",
    "latent_moe_use_norm": "Kimi K3's latent experts",
    "mla_use_output_gate": "Kimi K3's gated MLA",
    "routed_expert_hidden_size": "Kimi K3's latent experts",
}
# The sizes in `linear_attn_config` by the names that Transformers' own class gives them.
NATIVE_SIZES = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}


def require(is_allowed: bool, field: str, value: Any, allowed: str) -> None:
    """Raise ValueError unless the value is allowed."""
    if not is_allowed:
        raise ValueError(f"{field}={shown(value)} is not allowed: it must be {allowed}")


def shown(value: Any) -> str:
    """A value in a message: in one line, and not longer than one."""
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 32
    short.maxstring = short.maxother = MAX_SHOWN
    text = short.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_int(value: Any) -> bool:
    """Whether it is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number that float32 has."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= MAX_NUMBER


def is_list(value: Any) -> bool:
    """Whether it is a list or a tuple."""
    return isinstance(value, (list, tuple))


# ---- single fields -------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What one field may be, as a test and in words."""

    allows: Callable[[Any], bool]
    allowed: str


def _integer(least: int, most: int = MAX_SIZE, *, or_none: bool = False) -> Rule:
    none = "None or " if or_none else ""
    return Rule(
        lambda x: (or_none and x is None) or (is_int(x) and least <= x <= most),
        f"{none}an integer of at least {least}, at most {most}",
    )


def _one_of(choices: tuple[str, ...]) -> Rule:
    return Rule(lambda x: x in choices, f"one of {choices}")


SIZE, COUNT, SIZE_OR_NONE = _integer(1), _integer(0), _integer(1, or_none=True)
ABOVE_0 = Rule(lambda x: is_number(x) and x > 0, "a finite number above 0")
AT_LEAST_0 = Rule(lambda x: is_number(x) and x >= 0, "a finite number of at least 0")
SWITCH = Rule(lambda x: isinstance(x, bool), "True or False")

RULES = {
    "num_hidden_layers": _integer(1, MAX_LAYERS),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "head_dim": SIZE_OR_NONE,
    "intermediate_size": SIZE,
    "num_attention_heads": SIZE,
    "hidden_act": _one_of(ACTIVATIONS),
    "initializer_range": ABOVE_0,
    "rms_norm_eps": ABOVE_0,
    "use_cache": SWITCH,
    "tie_word_embeddings": SWITCH,
    "model_max_length": SIZE,
    "max_prompt_tokens": SIZE_OR_NONE,
    "rope_theta": ABOVE_0,
    "rope_scaling": Rule(lambda x: x is None, "None (there are no positions to scale)"),
    "attention_dropout": Rule(lambda x: is_number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "q_lora_rank": SIZE_OR_NONE,
    "kv_lora_rank": SIZE,
    "qk_nope_head_dim": SIZE,
    "qk_rope_head_dim": COUNT,
    "v_head_dim": SIZE,
    "mla_use_nope": Rule(lambda x: x is True, "True (MLA without positions)"),
    "num_experts": _integer(1, MAX_EXPERTS),
    "num_experts_per_token": SIZE,
    "num_shared_experts": _integer(0, or_none=True),
    "moe_intermediate_size": SIZE,
    "first_k_dense_replace": COUNT,
    "moe_layer_freq": SIZE,
    "moe_router_activation_func": _one_of(("sigmoid", "softmax")),
    "moe_renormalize": SWITCH,
    "routed_scaling_factor": ABOVE_0,
    "use_grouped_topk": SWITCH,
    "num_expert_group": SIZE,
    "topk_group": SIZE,
    "output_router_logits": SWITCH,
    "router_aux_loss_coef": AT_LEAST_0,
    "router_z_loss_coef": AT_LEAST_0,
    "router_bias_update_rate": AT_LEAST_0,
    "num_nextn_predict_layers": Rule(
        lambda x: x == 0, "0 (multi-token prediction is not implemented)"
    ),
}
LINEAR_ATTN_RULES = {
    "head_dim": Rule(
        lambda x: is_int(x) and MIN_KDA_HEAD_DIM <= x <= MAX_KDA_HEAD_DIM and x % 8 == 0,
        f"a multiple of 8 from {MIN_KDA_HEAD_DIM} to {MAX_KDA_HEAD_DIM} (KDA kernels)",
    ),
    "num_heads": SIZE,
    "short_conv_kernel_size": Rule(lambda x: is_int(x) and 2 <= x <= 4, "2, 3 or 4"),
}
LINEAR_ATTN_KEYS = tuple(sorted((*LAYER_LISTS, *LINEAR_ATTN_RULES)))


def check_field(config: Any, field: str) -> None:
    """Check one field of `RULES`."""
    rule, value = RULES[field], getattr(config, field)
    require(rule.allows(value), field, value, rule.allowed)


def check_fields(config: Any) -> None:
    """Check each field of `RULES` by itself."""
    for field in RULES:
        check_field(config, field)


# ---- fields that the model does not have ---------------------------------------------------------


def check_further_fields(config: Any, further: dict[str, Any]) -> None:
    """Refuse fields that mean something elsewhere, aliases that contradict, likely typos, and
    metadata of a wrong type, which the base class would read before any other check.

    Args:
        config: The configuration, its own fields set.
        further: What else was given.
    """
    for field, owner in UNSUPPORTED_FIELDS.items():
        if further.get(field) not in (None, False):
            raise ValueError(
                f"{field}={shown(further[field])} is not supported ({owner}): leave it out"
            )
    method, seq_aux = further.get("topk_method", "noaux_tc"), further.get("seq_aux")
    require(method == "noaux_tc", "topk_method", method, "'noaux_tc'")
    allowed = "True (the balance loss is that of each sequence)"
    require(seq_aux in (None, True), "seq_aux", seq_aux, allowed)
    for key, value in further.items():
        if key in config.attribute_map:
            _check_alias(config, key, value)
        elif not hasattr(type(config), key) and key not in NATIVE_SIZES:
            known = {*type(config).__dataclass_fields__, *config.attribute_map}
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"unknown field {key}={shown(value)}: did you mean {close[0]!r}?")
    _check_metadata(config, further)


def _check_alias(config: Any, alias: str, value: Any) -> None:
    field = config.attribute_map[alias]
    given, default = getattr(config, field), getattr(type(config), field)
    if given != default and given != value:
        raise ValueError(
            f"{alias}={shown(value)} contradicts {field}={shown(given)}: give one of the two"
        )


def _check_metadata(config: Any, further: dict[str, Any]) -> None:
    auto_map = further.get("auto_map")
    entries: list[Any] = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    names = [name for entry in entries for name in (entry if is_list(entry) else [entry])]
    is_map = auto_map is None or isinstance(auto_map, dict)
    are_names = is_map and all(isinstance(name, str | None) for name in names)
    require(are_names, "auto_map", auto_map, "a dict of 'module.Class' by auto class")
    dtype = further.get("torch_dtype") if config.dtype is None else config.dtype
    is_known = not isinstance(dtype, str) or isinstance(getattr(torch, dtype, None), torch.dtype)
    require(is_known, "dtype", dtype, "the name of a torch.dtype")
    count, allowed = further.get("num_labels"), f"an integer from 0 to {MAX_LABELS}"
    is_count = count is None or (is_int(count) and 0 <= count <= MAX_LABELS)
    require(is_count, "num_labels", count, allowed)


# ---- fields that depend on each other ------------------------------------------------------------


def check_together(config: Any) -> None:
    """Check what fields say together, each of them allowed by itself."""
    _check_special_ids(config)
    _check_attention(config)
    _check_experts(config)
    _check_layers(config)


def _check_special_ids(config: Any) -> None:
    allowed = f"None or a token id below vocab_size={config.vocab_size}"
    for field in SPECIAL_IDS:
        value = getattr(config, field)
        ids = value if field == "eos_token_id" and isinstance(value, list) else [value]
        in_range = all(i is None or (is_int(i) and 0 <= i < config.vocab_size) for i in ids)
        require(in_range, field, value, allowed)


def _check_attention(config: Any) -> None:
    heads, allowed = config.num_key_value_heads, f"num_attention_heads={config.num_attention_heads}"
    is_full = heads == config.num_attention_heads
    require(is_full, "num_key_value_heads", heads, f"{allowed} (MLA has no grouped heads)")
    for key, rule in LINEAR_ATTN_RULES.items():
        value = config.linear_attn_config[key]
        require(rule.allows(value), f"linear_attn_config[{key!r}]", value, rule.allowed)


def _check_experts(config: Any) -> None:
    for field in ("hidden_size", "moe_intermediate_size"):
        size = getattr(config, field)
        require(size % 8 == 0, field, size, "a multiple of 8, which grouped matrix products need")
    experts, groups = config.num_experts, config.num_expert_group
    topk_group, top_k = config.topk_group, config.num_experts_per_token
    in_group = experts // groups
    require(
        experts % groups == 0, "num_expert_group", groups, f"a divisor of num_experts={experts}"
    )
    require(topk_group <= groups, "topk_group", topk_group, f"at most num_expert_group={groups}")
    reachable = in_group * topk_group
    allowed = f"at most the {reachable} experts of topk_group groups"
    require(top_k <= reachable, "num_experts_per_token", top_k, allowed)
    if groups > 1:
        allowed = f"True with num_expert_group={groups}"
        require(config.use_grouped_topk, "use_grouped_topk", False, allowed)
        require(in_group >= 2, "num_expert_group", groups, "groups of at least 2 experts")


def _check_layers(config: Any) -> None:
    linear, count = config.linear_attn_config, config.num_hidden_layers
    seen: dict[int, str] = {}
    for key in LAYER_LISTS:
        field = f"linear_attn_config[{key!r}]"
        require(is_list(linear[key]), field, linear[key], "a list of layer numbers from 1")
        for number in linear[key]:
            allowed = f"layer numbers from 1 to num_hidden_layers={count}"
            require(is_int(number) and 1 <= number <= count, field, number, allowed)
            if number in seen:
                raise ValueError(
                    f"{field} holds layer {number}, as {seen[number]} does: name it once"
                )
            seen[number] = field
    missing = sorted(set(range(1, count + 1)) - set(seen))
    allowed = f"every layer in one of the two lists; missing: {shown(missing)}"
    require(not missing, "linear_attn_config", linear, allowed)
