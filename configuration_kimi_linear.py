"""Configuration of Kimi Linear: the official field names, checked.

Source: arXiv 2510.26692 (section 4, figure 3) and the `config.json` of the released 48B-A3B
checkpoints. The values of the 48B model are the defaults. Layer lists in `linear_attn_config` count
from 1, as in the released file; everything in Python (`layer_types`, `layer_idx`) counts from 0.
"""

import copy
import difflib
import reprlib
from typing import Any

import torch
import transformers

# Loading the configuration is the first thing that any loading does. Older releases have other
# names for what is imported below.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        "this implementation of Kimi Linear needs Transformers 5.17 or newer, this is "
        f"{transformers.__version__}: pip install --upgrade transformers"
    )

from kimi_linear.parallel.plans import EP_PLAN, PP_PLAN, TP_PLAN
from kimi_linear.presets import PRESETS
from kimi_linear.upstream.remote_code import SavesCode
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
LINEAR_ATTN_KEYS = (
    "full_attn_layers",
    "head_dim",
    "kda_layers",
    "num_heads",
    "short_conv_kernel_size",
)
LINEAR_ATTN_SIZES = {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4}
# FLA's KDA kernels hold one head's keys in one block of at most 256 channels; a tile is 16 wide.
MIN_KDA_HEAD_DIM, MAX_KDA_HEAD_DIM = 16, 256

# Beyond any model; a file with more is broken, and would take all memory before that shows.
MAX_SIZE = 2**31 - 1
MAX_LAYERS, MAX_EXPERTS, MAX_LABELS = 10_000, 100_000, 10_000_000
# Characters of a value in a message.
MAX_SHOWN = 240
# Float32's largest: what is beyond becomes infinite in the computation.
MAX_NUMBER = 3.4028234663852886e38

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
# Other spellings of the linear attention sizes and layer lists, as Transformers' own class writes
# them.
NATIVE_SIZES = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}

ROUTER_TRAINING = ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate")
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
SWITCHES = (
    "moe_renormalize",
    "output_router_logits",
    "tie_word_embeddings",
    "use_cache",
    "use_grouped_topk",
)
POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
    "num_experts",
    "num_experts_per_token",
    "moe_intermediate_size",
    "moe_layer_freq",
    "num_expert_group",
    "topk_group",
    "model_max_length",
)


class KimiLinearConfig(SavesCode, PreTrainedConfig):
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
            groups, of which the best `topk_group` take part in the choice.
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
            `moe_training.py` for this and the next two.
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
        self._check_extra_fields(kwargs)
        self._check_size("num_hidden_layers")
        self._check_metadata(kwargs)
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
        self._check_sizes()  # what follows computes with them
        for field in SPECIAL_IDS:  # the defaults are the released vocabulary's
            if getattr(self, field) == getattr(type(self), field) >= self.vocab_size:
                setattr(self, field, None)
        _require(
            qk_head_dim in (None, self.qk_head_dim),
            "qk_head_dim",
            qk_head_dim,
            f"qk_nope_head_dim + qk_rope_head_dim = {self.qk_head_dim}",
        )
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
        _require(name in PRESETS, "preset", name, "one of " + ", ".join(PRESETS))
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
        return [
            "full_attention" if number in full else "linear_attention"
            for number in range(1, self.num_hidden_layers + 1)
        ]

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
        names = ("kda_layers", "full_attn_layers")
        named = sorted(number for name in names for number in lists[name])
        if len(named) > count >= 1 and named == list(range(1, len(named) + 1)):
            fitting = {name: [n for n in lists[name] if n <= count] for name in names}
            self.linear_attn_config = {**lists, **fitting}

    def check(self) -> None:
        """Check every field.

        Raises:
            ValueError: With the field, its value and what is allowed.
        """
        self._check_sizes()
        self._check_choices()
        self._check_attention()
        self._check_experts()
        self._check_layers()

    def _check_extra_fields(self, kwargs: dict[str, Any]) -> None:
        """Refuse fields that mean something elsewhere, aliases that contradict, likely typos."""
        for field, owner in UNSUPPORTED_FIELDS.items():
            if kwargs.get(field) not in (None, False):
                raise ValueError(
                    f"{field}={_shown(kwargs[field])} is not supported ({owner}): leave it out"
                )
        _require(
            kwargs.get("topk_method", "noaux_tc") == "noaux_tc",
            "topk_method",
            kwargs.get("topk_method"),
            "'noaux_tc'",
        )
        _require(
            kwargs.get("seq_aux") in (None, True),
            "seq_aux",
            kwargs.get("seq_aux"),
            "True (the balance loss is that of each sequence)",
        )
        known = set(type(self).__dataclass_fields__)
        for key, value in kwargs.items():
            if key in self.attribute_map:
                field = self.attribute_map[key]
                given, default = getattr(self, field), getattr(type(self), field)
                if given != default and given != value:
                    raise ValueError(
                        f"{key}={_shown(value)} contradicts {field}={_shown(given)}: give one "
                        "of the two"
                    )
            elif not hasattr(type(self), key) and key not in NATIVE_SIZES:
                close = difflib.get_close_matches(
                    key, known | set(self.attribute_map), n=1, cutoff=0.85
                )
                if close:
                    raise ValueError(
                        f"unknown field {key}={_shown(value)}: did you mean {close[0]!r}?"
                    )

    def _check_metadata(self, kwargs: dict[str, Any]) -> None:
        """Check the types of what the base class, and this one, read before the other fields."""
        auto_map = kwargs.get("auto_map")
        entries: list[Any] = list(auto_map.values()) if isinstance(auto_map, dict) else []
        names = [n for entry in entries for n in (entry if _is_list(entry) else [entry])]
        _require(
            auto_map is None
            or (isinstance(auto_map, dict) and all(isinstance(n, str | None) for n in names)),
            "auto_map",
            auto_map,
            "a dict of 'module.Class' by auto class",
        )
        dtype = kwargs.get("torch_dtype") if self.dtype is None else self.dtype
        known = not isinstance(dtype, str) or isinstance(getattr(torch, dtype, None), torch.dtype)
        _require(known, "dtype", dtype, "the name of a torch.dtype")
        count = kwargs.get("num_labels")
        _require(
            count is None or (_is_int(count) and 0 <= count <= MAX_LABELS),
            "num_labels",
            count,
            f"an integer from 0 to {MAX_LABELS}",
        )

    def _full_linear_attn_config(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The official dict with sizes and both layer lists, keys sorted as in the released file.

        Takes Transformers' own spelling (`linear_*` sizes, a 0-counted `layer_types` list) out of
        `kwargs`.
        """
        given = (
            copy.deepcopy(self.linear_attn_config) if self.linear_attn_config is not None else {}
        )
        _require(isinstance(given, dict), "linear_attn_config", given, "a dict")
        for key in given:
            _require(
                key in LINEAR_ATTN_KEYS,
                "linear_attn_config",
                key,
                f"a dict with the keys {LINEAR_ATTN_KEYS}",
            )
        for key in ("kda_layers", "full_attn_layers"):
            value = given.get(key, [])
            field = f"linear_attn_config[{key!r}]"
            is_list = isinstance(value, list) and all(map(_is_int, value))
            _require(is_list, field, value, "a list of layer numbers from 1")
        other = {NATIVE_SIZES[key]: kwargs.pop(key) for key in NATIVE_SIZES if key in kwargs}
        other |= self._layer_lists(kwargs.pop("layer_types", None))
        for key, value in other.items():
            if given.setdefault(key, value) != value:
                raise ValueError(
                    f"linear_attn_config[{key!r}]={_shown(given[key])} contradicts the other "
                    f"spelling's {_shown(value)}"
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
        lists = {"linear_attention": "kda_layers", "full_attention": "full_attn_layers"}
        _require(
            _is_list(layer_types)
            and len(layer_types) == self.num_hidden_layers
            and all(isinstance(kind, str) and kind in lists for kind in layer_types),
            "layer_types",
            layer_types,
            f"one of {tuple(lists)} for each of num_hidden_layers={self.num_hidden_layers} layers",
        )
        return {
            key: [number for number, entry in enumerate(layer_types, start=1) if entry == kind]
            for kind, key in lists.items()
        }

    def _read_mlp_layer_types(self, mlp_layer_types: Any) -> None:
        """Accept Transformers' per-layer list where the official two fields can express it."""
        allowed = "a list of 'dense' and 'sparse'"
        _require(_is_list(mlp_layer_types), "mlp_layer_types", mlp_layer_types, allowed)
        leading = next(
            (i for i, kind in enumerate(mlp_layer_types) if kind != "dense"), len(mlp_layer_types)
        )
        self.first_k_dense_replace = leading
        expected = [
            "sparse" if self.is_moe_layer(i) else "dense" for i in range(self.num_hidden_layers)
        ]
        _require(
            list(mlp_layer_types) == expected,
            "mlp_layer_types",
            mlp_layer_types,
            f"{_shown(expected)} (first_k_dense_replace={leading}, "
            f"moe_layer_freq={self.moe_layer_freq})",
        )

    def _check_size(self, field: str, least: int = 1, *, is_optional: bool = False) -> None:
        """Check that a field is an integer of at least `least`, and not beyond any model."""
        most = {"num_hidden_layers": MAX_LAYERS, "num_experts": MAX_EXPERTS}.get(field, MAX_SIZE)
        value = getattr(self, field)
        _require(
            (value is None and is_optional) or (_is_int(value) and least <= value <= most),
            field,
            value,
            f"{'None or ' if is_optional else ''}an integer of at least {least}, at most {most}",
        )

    def _check_sizes(self) -> None:
        for field in POSITIVE_FIELDS:
            self._check_size(field)
        for field in ("qk_rope_head_dim", "first_k_dense_replace"):
            self._check_size(field, 0)
        for field in ("q_lora_rank", "head_dim", "max_prompt_tokens"):
            self._check_size(field, is_optional=True)
        self._check_size("num_shared_experts", 0, is_optional=True)
        for field in ("rms_norm_eps", "routed_scaling_factor", "initializer_range", "rope_theta"):
            value = getattr(self, field)
            _require(_is_number(value) and value > 0, field, value, "a finite number above 0")
        for field in ROUTER_TRAINING:
            value = getattr(self, field)
            is_allowed = _is_number(value) and value >= 0
            _require(is_allowed, field, value, "a finite number of at least 0")
        dropout = self.attention_dropout
        _require(
            _is_number(dropout) and 0 <= dropout < 1,
            "attention_dropout",
            dropout,
            "a number in [0, 1)",
        )

    def _check_choices(self) -> None:
        _require(
            self.hidden_act in ACTIVATIONS, "hidden_act", self.hidden_act, f"one of {ACTIVATIONS}"
        )
        functions = ("sigmoid", "softmax")
        name = self.moe_router_activation_func
        _require(name in functions, "moe_router_activation_func", name, f"one of {functions}")
        _require(
            self.mla_use_nope is True,
            "mla_use_nope",
            self.mla_use_nope,
            "True (MLA without positions)",
        )
        _require(
            self.rope_scaling is None,
            "rope_scaling",
            self.rope_scaling,
            "None (there are no positions to scale)",
        )
        layers = self.num_nextn_predict_layers
        _require(
            layers == 0,
            "num_nextn_predict_layers",
            layers,
            "0 (multi-token prediction is not implemented)",
        )
        for field in SWITCHES:
            value = getattr(self, field)
            _require(isinstance(value, bool), field, value, "True or False")
        for field in SPECIAL_IDS:
            value = getattr(self, field)
            ids = value if field == "eos_token_id" and isinstance(value, list) else [value]
            _require(
                all(i is None or (_is_int(i) and 0 <= i < self.vocab_size) for i in ids),
                field,
                value,
                f"None or a token id below vocab_size={self.vocab_size}",
            )

    def _check_attention(self) -> None:
        heads = self.num_key_value_heads
        _require(
            heads == self.num_attention_heads,
            "num_key_value_heads",
            heads,
            f"num_attention_heads={self.num_attention_heads} (MLA has no grouped heads)",
        )
        linear = self.linear_attn_config
        for key in ("num_heads", "short_conv_kernel_size"):
            _require(
                _is_int(linear[key]) and 1 <= linear[key] <= MAX_SIZE,
                f"linear_attn_config[{key!r}]",
                linear[key],
                f"an integer from 1 to {MAX_SIZE}",
            )
        _require(
            2 <= linear["short_conv_kernel_size"] <= 4,
            "linear_attn_config['short_conv_kernel_size']",
            linear["short_conv_kernel_size"],
            "2, 3 or 4",
        )
        size = linear["head_dim"]
        _require(
            _is_int(size) and MIN_KDA_HEAD_DIM <= size <= MAX_KDA_HEAD_DIM and size % 8 == 0,
            "linear_attn_config['head_dim']",
            size,
            f"a multiple of 8 from {MIN_KDA_HEAD_DIM} to {MAX_KDA_HEAD_DIM} (KDA kernels)",
        )

    def _check_experts(self) -> None:
        for field in ("hidden_size", "moe_intermediate_size"):
            size = getattr(self, field)
            _require(
                size % 8 == 0, field, size, "a multiple of 8, which grouped matrix products need"
            )
        experts, groups, top_k = self.num_experts, self.num_expert_group, self.num_experts_per_token
        _require(
            experts % groups == 0, "num_expert_group", groups, f"a divisor of num_experts={experts}"
        )
        _require(
            self.topk_group <= groups,
            "topk_group",
            self.topk_group,
            f"at most num_expert_group={groups}",
        )
        reachable = experts // groups * self.topk_group
        _require(
            top_k <= reachable,
            "num_experts_per_token",
            top_k,
            f"at most the {reachable} experts of topk_group groups",
        )
        if groups > 1:
            _require(
                self.use_grouped_topk,
                "use_grouped_topk",
                False,
                f"True with num_expert_group={groups}",
            )
            _require(
                experts // groups >= 2, "num_expert_group", groups, "groups of at least 2 experts"
            )

    def _check_layers(self) -> None:
        linear, count = self.linear_attn_config, self.num_hidden_layers
        seen: dict[int, str] = {}
        for key in ("kda_layers", "full_attn_layers"):
            field = f"linear_attn_config[{key!r}]"
            _require(
                isinstance(linear[key], (list, tuple)),
                field,
                linear[key],
                "a list of layer numbers from 1",
            )
            for number in linear[key]:
                in_range = _is_int(number) and 1 <= number <= count
                _require(
                    in_range, field, number, f"layer numbers from 1 to num_hidden_layers={count}"
                )
                if number in seen:
                    raise ValueError(
                        f"{field} holds layer {number}, as {seen[number]} does: name it once"
                    )
                seen[number] = field
        missing = sorted(set(range(1, count + 1)) - set(seen))
        _require(
            not missing,
            "linear_attn_config",
            linear,
            f"every layer in one of the two lists; missing: {_shown(missing)}",
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_number(value: Any) -> bool:
    """Whether it is one that float32 has."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= MAX_NUMBER


def _shown(value: Any) -> str:
    """A value in a message: in one line, and not longer than one."""
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 32
    short.maxstring = short.maxother = MAX_SHOWN
    text = short.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field}={_shown(value)} is not allowed: it must be {allowed}")


__all__ = ["KimiLinearConfig"]
