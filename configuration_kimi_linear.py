"""Configuration of Kimi Linear: the official field names, checked.

Source: arXiv 2510.26692 (section 4, figure 3) and the `config.json` of the released 48B-A3B
checkpoints. The values of the 48B model are the defaults. Layer lists in `linear_attn_config` count
from 1, as in the released file; everything in Python (`layer_types`, `layer_idx`) counts from 0.
"""

import copy
from typing import Any

import transformers

# Loading the configuration is the first thing that any loading does. Older releases have other
# names for what is imported below.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        "this implementation of Kimi Linear needs Transformers 5.17 or newer, this is "
        f"{transformers.__version__}: pip install --upgrade transformers"
    )

from transformers.configuration_utils import PreTrainedConfig

from kimi_linear.configuration_plans import EP_PLAN, PP_PLAN, TP_PLAN
from kimi_linear.configuration_rules import (
    LAYER_LISTS,
    LINEAR_ATTN_KEYS,
    NATIVE_SIZES,
    SPECIAL_IDS,
    check_field,
    check_fields,
    check_further_fields,
    check_together,
    is_int,
    is_list,
    require,
    shown,
)
from kimi_linear.presets import PRESETS
from kimi_linear.upstream.remote_code import SavesCode
from kimi_linear.upstream.stored import ReadsStored

LAYER_TYPES = ("linear_attention", "full_attention")  # KDA and MLA
LINEAR_ATTN_SIZES = {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4}


class KimiLinearConfig(SavesCode, ReadsStored, PreTrainedConfig):
    """Configuration of a Kimi Linear model.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width D of the residual stream.
        head_dim: `hidden_size // num_attention_heads` by convention; not used in the computation,
            kept since inference engines read it.
        intermediate_size: Width of the dense MLPs.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Heads of the MLA layers.
        num_key_value_heads: Equals `num_attention_heads`; None means so.
        q_lora_rank: Rank of the query projection in MLA layers, or None for a full one.
        kv_lora_rank: Width of the latent that an MLA layer caches.
        qk_nope_head_dim: Per-head key width made from the latent.
        qk_rope_head_dim: Key width shared by all heads. It carries no positions here, only its name
            does.
        v_head_dim: Per-head value width of MLA layers.
        mla_use_nope: Always True: MLA without positions.
        linear_attn_config: Dict with `kda_layers` and `full_attn_layers` (layer numbers from 1),
            `num_heads`, `head_dim` (key and value size) and `short_conv_kernel_size` of the KDA
            layers. Lists left out are filled with three KDA layers to one MLA layer, the last layer
            MLA.
        num_experts: Routed experts per MoE layer.
        num_experts_per_token: Routed experts that one token uses.
        num_shared_experts: Experts that every token uses, as one MLP of that many times the width.
            0: none.
        moe_intermediate_size: Width of one expert.
        first_k_dense_replace: Layers before this index have a dense MLP.
        moe_layer_freq: From there on, layers whose index it divides have experts.
        moe_router_activation_func: "sigmoid" or "softmax".
        moe_renormalize: Whether the weights of the chosen experts are divided by their sum.
        routed_scaling_factor: Factor on the routed experts' weights.
        use_grouped_topk, num_expert_group, topk_group: The experts stand in `num_expert_group`
            groups, and only the best `topk_group` groups take part in the choice.
        rms_norm_eps: Epsilon of the layer norms and of KDA's output norm.
        model_max_length: Longest context the model is meant for, in tokens. It may read more: there
            are no positions to run out of.
        max_prompt_tokens: Longest prompt that `generate()` takes, cached tokens included; None: any
            length.
        rope_theta, rope_scaling: Carried for other engines; there are no rotary positions.
            `rope_scaling` must be None.
        num_nextn_predict_layers: Must be 0.
        attention_dropout: Dropout probability on attention weights of MLA layers in training.
        output_router_logits: Whether outputs carry the router logits of each MoE layer, and
            `aux_loss`.
        router_aux_loss_coef: Coefficient of the sequence-wise balance loss in training. See
            `training/router_losses.py` for this and the next two.
        router_z_loss_coef: Coefficient of the router z-loss in training.
        router_bias_update_rate: Step of the update of the experts' correction biases, where
            `balance_experts` is used.

    Raises:
        ValueError: For a value that is wrong, contradicts another, or asks for something not
            implemented; the message names field, value and what is allowed.
    """

    model_type = "kimi_linear"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "aux_loss_alpha": "router_aux_loss_coef",
        "max_position_embeddings": "model_max_length",
        "n_group": "num_expert_group",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "norm_topk_prob": "moe_renormalize",
        "num_experts_per_tok": "num_experts_per_token",
        "num_local_experts": "num_experts",
    }
    base_model_tp_plan = TP_PLAN
    base_model_ep_plan = EP_PLAN
    base_model_pp_plan = PP_PLAN

    vocab_size: int = 163840
    hidden_size: int = 2304
    head_dim: int | None = None
    intermediate_size: int = 9216
    num_hidden_layers: int = 27
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 163839
    bos_token_id: int | None = 163584
    eos_token_id: int | list[int] | None = 163586
    model_max_length: int = 1048576
    max_prompt_tokens: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_dropout: float = 0.0

    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    mla_use_nope: bool = True
    linear_attn_config: dict[str, Any] = None  # type: ignore[assignment]  # filled at once

    num_experts: int = 256
    num_experts_per_token: int = 8
    num_shared_experts: int | None = 1
    moe_intermediate_size: int = 1024
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    moe_router_activation_func: str = "sigmoid"
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    use_grouped_topk: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    router_bias_update_rate: float = 0.0

    num_nextn_predict_layers: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        check_further_fields(self, kwargs)
        check_field(self, "num_hidden_layers")
        mlp_layer_types = kwargs.pop("mlp_layer_types", None)
        qk_head_dim = kwargs.pop("qk_head_dim", None)  # as Transformers' own class saves it
        if kwargs.get("auto_map"):
            # the files of another implementation are not saved along with this one's
            kwargs["auto_map"] = {
                auto_class: name
                for auto_class, name in kwargs["auto_map"].items()
                if isinstance(name, str) and "_kimi_linear." in name
            }
        # before the base class, which reads layer_types
        self.linear_attn_config = self._full_linear_attn_config(kwargs)
        super().__post_init__(**kwargs)
        check_fields(self)  # what follows computes with them
        for field in SPECIAL_IDS:  # the defaults are the released vocabulary's
            if getattr(self, field) == getattr(type(self), field) >= self.vocab_size:
                setattr(self, field, None)
        allowed = f"qk_nope_head_dim + qk_rope_head_dim = {self.qk_head_dim}"
        require(qk_head_dim in (None, self.qk_head_dim), "qk_head_dim", qk_head_dim, allowed)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if mlp_layer_types is not None:
            self._read_mlp_layer_types(mlp_layer_types)
        self.check()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "KimiLinearConfig":
        """Configuration of one of the sizes in `presets.py`, with single fields replaced.

        Args:
            name: A key of `PRESETS`, for instance "20m".
            **overrides: Fields that replace the preset's.

        Raises:
            ValueError: If there is no such preset; the message lists them.
        """
        require(name in PRESETS, "preset", name, "one of " + ", ".join(PRESETS))
        fields = copy.deepcopy(PRESETS[name])
        if "vocab_size" in overrides and "vocab_size" in fields:
            added = overrides["vocab_size"] - fields["vocab_size"]
            for field in SPECIAL_IDS:  # they stand at the end of the vocabulary
                fields[field] += added
        return cls(**{**fields, **overrides})

    @property
    def layer_types(self) -> list[str]:
        """Per layer, "linear_attention" (KDA) or "full_attention" (MLA)."""
        full = set(self.linear_attn_config["full_attn_layers"])
        return [LAYER_TYPES[n in full] for n in range(1, self.num_hidden_layers + 1)]

    @property
    def qk_head_dim(self) -> int:
        """Per-head query and key width of MLA layers."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (from 0) has routed experts."""
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check again, for fields changed after construction; `save_pretrained` calls this."""
        self.check()  # what follows computes with sizes
        super().validate(*args, **kwargs)

    def fit_layer_lists(self) -> None:
        """Forget the kinds of layers that there are no more: `num_hidden_layers` was lowered on a
        configuration that named each layer's kind."""
        lists, count = self.linear_attn_config, self.num_hidden_layers
        named = sorted(number for name in LAYER_LISTS for number in lists[name])
        if len(named) > count >= 1 and named == list(range(1, len(named) + 1)):
            fitting = {name: [n for n in lists[name] if n <= count] for name in LAYER_LISTS}
            self.linear_attn_config = {**lists, **fitting}

    def check(self) -> None:
        """Check every field.

        Raises:
            ValueError: With the field, its value and what is allowed.
        """
        check_fields(self)
        check_together(self)

    def _full_linear_attn_config(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The official dict with sizes and both layer lists, keys sorted as in the released file.

        Takes Transformers' own spelling (`linear_*` sizes, a 0-counted `layer_types` list) out of
        `kwargs`.
        """
        given = {} if self.linear_attn_config is None else copy.deepcopy(self.linear_attn_config)
        require(isinstance(given, dict), "linear_attn_config", given, "a dict")
        for key, value in given.items():
            allowed = f"a dict with the keys {LINEAR_ATTN_KEYS}"
            require(key in LINEAR_ATTN_KEYS, "linear_attn_config", key, allowed)
            if key in LAYER_LISTS:
                are_numbers = isinstance(value, list) and all(map(is_int, value))
                allowed = "a list of layer numbers from 1"
                require(are_numbers, f"linear_attn_config[{key!r}]", value, allowed)
        other = {NATIVE_SIZES[key]: kwargs.pop(key) for key in NATIVE_SIZES if key in kwargs}
        other |= self._layer_lists(kwargs.pop("layer_types", None))
        for key, value in other.items():
            if given.setdefault(key, value) != value:
                raise ValueError(
                    f"linear_attn_config[{key!r}]={shown(given[key])} contradicts the other "
                    f"spelling's {shown(value)}"
                )
        numbers = range(1, self.num_hidden_layers + 1)
        if "kda_layers" not in given:
            default = [n for n in numbers if n % 4 == 0 or n == self.num_hidden_layers]
            full = given.setdefault("full_attn_layers", default)
            given["kda_layers"] = sorted(set(numbers) - set(full))
        elif "full_attn_layers" not in given:
            given["full_attn_layers"] = sorted(set(numbers) - set(given["kda_layers"]))
        return dict(sorted({**LINEAR_ATTN_SIZES, **given}.items()))

    def _layer_lists(self, layer_types: Any) -> dict[str, list[int]]:
        """The two lists, counted from 1, that a 0-counted list of layer types stands for."""
        if layer_types is None:
            return {}
        lists, count = dict(zip(LAYER_TYPES, LAYER_LISTS, strict=True)), self.num_hidden_layers
        are_types = (
            is_list(layer_types)
            and len(layer_types) == count
            and all(isinstance(kind, str) and kind in lists for kind in layer_types)
        )
        allowed = f"one of {LAYER_TYPES} for each of num_hidden_layers={count} layers"
        require(are_types, "layer_types", layer_types, allowed)
        return {
            key: [number for number, entry in enumerate(layer_types, start=1) if entry == kind]
            for kind, key in lists.items()
        }

    def _read_mlp_layer_types(self, mlp_layer_types: Any) -> None:
        """Accept Transformers' per-layer list where the official two fields can express it."""
        allowed = "a list of 'dense' and 'sparse'"
        require(is_list(mlp_layer_types), "mlp_layer_types", mlp_layer_types, allowed)
        leading = next(
            (i for i, kind in enumerate(mlp_layer_types) if kind != "dense"), len(mlp_layer_types)
        )
        self.first_k_dense_replace = leading
        expected = [
            "sparse" if self.is_moe_layer(i) else "dense" for i in range(self.num_hidden_layers)
        ]
        allowed = (
            f"{shown(expected)} (first_k_dense_replace={leading}, "
            f"moe_layer_freq={self.moe_layer_freq})"
        )
        is_expected = list(mlp_layer_types) == expected
        require(is_expected, "mlp_layer_types", mlp_layer_types, allowed)
