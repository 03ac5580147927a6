"""What other engines make of a configuration.

A checkpoint that they read may still be computed otherwise there, without an error, or be refused.
Rules come from the engine's source in the release named here; those of llama.cpp and mlx-lm were
also run, with small models. `docs/engines.md` has the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.configuration_rules import require


class Problem(NamedTuple):
    """What an engine does with a field.

    Attributes:
        fields: Names and values, as in "hidden_act='gelu'".
        effect: What happens, as in "refused".
        is_silent: Whether it computes something else without an error.
    """

    fields: str
    effect: str
    is_silent: bool

    def __str__(self) -> str:
        return f"{self.fields}: {self.effect}" + (", without an error" if self.is_silent else "")


@dataclass(frozen=True)
class _Rule:
    """A field that an engine takes otherwise.

    Attributes:
        names: Of the configuration's fields; of one in a dict, "field.key".
        applies: Whether it does for this configuration.
        effect: What happens then.
        is_silent: Whether without an error.
    """

    names: tuple[str, ...]
    applies: Callable[[KimiLinearConfig], bool]
    effect: str
    is_silent: bool = False


def has_experts(config: KimiLinearConfig) -> bool:
    """Whether a layer has routed experts."""
    return any(config.is_moe_layer(i) for i in range(config.num_hidden_layers))


def _has(kind: str) -> Callable[[KimiLinearConfig], bool]:
    return lambda config: kind in config.layer_types


_has_kda, _has_mla = _has("linear_attention"), _has("full_attention")


def _refused(names: str, applies: Callable[[KimiLinearConfig], bool], why: str = "") -> _Rule:
    return _Rule(tuple(names.split()), applies, "refused" + (f": {why}" if why else ""))


def _silent(names: str, applies: Callable[[KimiLinearConfig], bool], effect: str) -> _Rule:
    return _Rule(tuple(names.split()), applies, effect, is_silent=True)


_ONE_EXPERT = _silent(
    "num_experts_per_token moe_renormalize",
    lambda c: has_experts(c) and c.num_experts_per_token == 1 and c.moe_renormalize,
    "the expert's weight is 1, not its score",
)
_EPSILON = _silent(
    "rms_norm_eps",
    lambda c: _has_kda(c) and c.rms_norm_eps != 1e-5,
    "KDA's output norm takes 1e-5",
)
_TIED = _silent(
    "tie_word_embeddings",
    lambda c: c.tie_word_embeddings,
    "the head is left uninitialised, unless the files have lm_head.weight",
)
_ACTIVATION = _refused("hidden_act", lambda c: c.hidden_act != "silu", "only 'silu'")
_SCORES = "moe_router_activation_func"


def _is_softmax(config: KimiLinearConfig) -> bool:
    return has_experts(config) and config.moe_router_activation_func != "sigmoid"


def _has_groups(config: KimiLinearConfig) -> bool:
    return has_experts(config) and config.num_expert_group > 1


def _leaves_groups_out(config: KimiLinearConfig) -> bool:
    return _has_groups(config) and config.topk_group < config.num_expert_group


def _is_power(size: int) -> bool:
    return size & (size - 1) == 0


def _has_one_kind(config: KimiLinearConfig) -> bool:
    return not (_has_kda(config) and _has_mla(config))


_QUERY_RANK = _refused("q_lora_rank", lambda c: _has_mla(c) and bool(c.q_lora_rank), "only None")
_ALWAYS_SILU = _silent(
    "hidden_act", lambda c: c.hidden_act not in ("silu", "swish"), "computed as 'silu'"
)
_LAYERS = _refused("layer_types", _has_one_kind, "only both kinds, when it decodes")

# By engine: the release that was read, and the rules.
ENGINES: dict[str, tuple[str, tuple[_Rule, ...]]] = {
    "llama.cpp": (
        "b11739",
        (
            _silent(
                "moe_renormalize",
                lambda c: has_experts(c) and not c.moe_renormalize,
                "computed as True",
            ),
            _silent(
                "num_experts_per_token",
                lambda c: has_experts(c) and c.num_experts_per_token == 1,
                "the expert's weight is 1, not its score",
            ),
            _silent(
                "num_expert_group topk_group",
                _leaves_groups_out,
                "groups are ignored",
            ),
            _silent(
                "num_shared_experts",
                lambda c: has_experts(c) and c.num_shared_experts == 0,
                "silu of the input is added",
            ),
            _ALWAYS_SILU,
            _refused(
                "num_shared_experts",
                lambda c: has_experts(c) and c.num_shared_experts is None,
                "only a number, when it is converted",
            ),
            _refused("moe_layer_freq", lambda c: has_experts(c) and c.moe_layer_freq > 1, "only 1"),
            _refused(
                "num_experts", lambda c: has_experts(c) and c.num_experts > 1024, "at most 1024"
            ),
            _refused("num_hidden_layers", lambda c: c.num_hidden_layers > 512, "at most 512"),
            _refused("tie_word_embeddings", lambda c: c.tie_word_embeddings, "only False"),
            _QUERY_RANK,
            _refused(
                "linear_attn_config.num_heads num_attention_heads",
                lambda c: (
                    not _has_one_kind(c)
                    and c.linear_attn_config["num_heads"] != c.num_attention_heads
                ),
                "only as many KDA heads as MLA heads",
            ),
            _LAYERS,
        ),
    ),
    "mlx-lm": (
        "0.32.2",
        (
            _ALWAYS_SILU,
            _silent(
                "num_expert_group topk_group",
                _leaves_groups_out,
                "experts of other groups can be chosen where biased scores are below 0",
            ),
            _QUERY_RANK,
            _LAYERS,
        ),
    ),
    "vllm": (
        "0.33.0",
        (
            _ACTIVATION,
            _refused(
                "qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank",
                lambda c: (
                    _has_mla(c)
                    and (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank)
                    != (128, 64, 128, 512)
                ),
                "only 128, 64, 128 and 512",
            ),
            _refused(
                "num_expert_group num_experts_per_token",
                lambda c: _has_groups(c) and max(c.num_expert_group, c.num_experts_per_token) > 32,
                "at most 32",
            ),
            _ONE_EXPERT,
            _EPSILON,
            _TIED,
            _silent("dtype", lambda c: c.dtype == torch.float32, "computed in bfloat16"),
        ),
    ),
    "sglang": (
        "0.5.23",
        (
            _ACTIVATION,
            _QUERY_RANK,
            _silent(_SCORES, _is_softmax, "computed as 'sigmoid'"),
            _ONE_EXPERT,
            _EPSILON,
            _TIED,
            _silent("dtype", lambda c: c.dtype in (None, torch.float32), "computed in float16"),
        ),
    ),
    "exllamav3": (
        "1.6.5",
        (
            _ACTIVATION,
            _refused(_SCORES, _is_softmax, "only 'sigmoid'"),
            _refused(
                "moe_renormalize", lambda c: has_experts(c) and not c.moe_renormalize, "only True"
            ),
            _refused("num_expert_group", _has_groups, "only 1"),
            _refused(
                "linear_attn_config.head_dim",
                lambda c: _has_kda(c) and c.linear_attn_config["head_dim"] != 128,
                "only a head_dim of 128, when it decodes",
            ),
            _refused(
                "kv_lora_rank v_head_dim qk_rope_head_dim",
                lambda c: (
                    _has_mla(c)
                    and not all(map(_is_power, (c.kv_lora_rank, c.v_head_dim, c.qk_rope_head_dim)))
                ),
                "only powers of two",
            ),
            _ONE_EXPERT,
        ),
    ),
}


def engine_problems(config: KimiLinearConfig, engine: str) -> list[Problem]:
    """What another engine computes otherwise, or refuses, of models with this configuration.

    Args:
        config: A checked configuration.
        engine: One of `ENGINES`; the release that was read stands there.

    Returns:
        One for each rule that applies, what happens without an error first. Empty: none is known.

    Raises:
        ValueError: For an engine that is not one of `ENGINES`.
    """
    require(engine in ENGINES, "engine", engine, f"one of {', '.join(ENGINES)}")
    found = []
    for rule in ENGINES[engine][1]:
        if rule.applies(config):
            fields = ", ".join(_shown(config, name) for name in rule.names)
            found.append(Problem(fields, rule.effect, rule.is_silent))
    return sorted(found, key=lambda problem: not problem.is_silent)


def _shown(config: KimiLinearConfig, name: str) -> str:
    """A field and its value."""
    field, _, key = name.partition(".")
    value = getattr(config, field)
    return f"{field}[{key!r}]={value[key]!r}" if key else f"{field}={value!r}"
