"""Whether a GGUF holds the model and the tokenizer that it was made of."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from exporting.template import llama_template
from kimi_linear import KimiLinearConfig
from kimi_linear.checkpoints.folders import read_object
from kimi_linear.tokenizer.convert import make_pre_tokenizer

PREFIX = "kimi-linear."
# Scripts and signs that a pre-tokenizer can go wrong with, but for combining marks: those llama.cpp
# is known to cut otherwise.
PROBE = """\
def quicksort(items: list[int]) -> list[int]:
    \"\"\"Sort, smallest first; it doesn't change `items`.\"\"\"
    if len(items) <= 1:
\t\treturn items

    pivot = items[len(items) // 2]  # 3.14159, 1234567, 0x7F
The HTTPServer's owner WE'LL answer: "Don't!" (or so I'm told)...

月之暗面的模型，2025年。线性注意力 and 中文 mixed中text。カタカナとひらがな。한국어 문장입니다.
Съешь же ещё этих мягких булок. Ζαφείρι δέξου πάγκαλο. Über naïve façades: ½ ² Ⅷ ß.
\u2028 \u00a0   \t  \r\n  emoji: 👩\u200d🚀 👍🏽 🇩🇪 ✨ — “quotes” … €100 ∑∫√ <|im_end| [BOS

"""


class ExportError(RuntimeError):
    """What was made is not what was to be made; the message is one line."""


def check_tokenizer_kind(folder: Path) -> None:
    """Check that llama.cpp's "kimi-k2" cuts text as this tokenizer does.

    Raises:
        ValueError: The tokenizer is of another kind.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; allowed: a converted tokenizer (scripts/convert_tokenizer.py)"
        )
    found = read_object(path)
    own = json.loads(_as_json(make_pre_tokenizer()))
    kind = (found.get("model") or {}).get("type")
    if found.get("pre_tokenizer") != own or kind != "BPE" or found.get("normalizer") is not None:
        raise ValueError(
            f"{path}: it cuts text otherwise than this package's tokenizers, which are the only "
            "ones that llama.cpp's pre-tokenizer kimi-k2 fits"
        )
    if not found["model"].get("merges"):
        raise ValueError(f"{path} has no merges; allowed: a vocabulary that llama.cpp reads")
    if Tokenizer.from_file(str(path)).encode("").ids:
        raise ValueError(f"{path}: post_processor adds tokens to a text; allowed: none")


def _as_json(pre_tokenizer: Any) -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    return json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])


def unreached_tokens(folder: Path) -> int:
    """How many tokens no merge makes: llama.cpp never writes those, this tokenizer does where they
    are a whole piece of text."""
    model = read_object(folder / "tokenizer.json")["model"]
    made = {
        "".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]
    }
    return sum(len(token) > 1 and token not in made for token in model["vocab"])


def check_file(found: dict[str, Any], config: KimiLinearConfig, groups: int) -> None:
    """Compare keys and tensors of a GGUF with a configuration.

    Args:
        found: What `reader.describe` says.
        config: What the file describes.
        groups: Of experts; 0 for none.

    Raises:
        ExportError: They differ; the message has the first keys or tensors that do.
    """
    wanted, keys = expected_keys(config, groups), found["keys"]
    wrong = [
        f"{key} is {keys.get(key)!r} and not {value!r}"
        for key, value in wanted.items()
        if not _is(keys.get(key), value)
    ]
    tensors, shapes = found["tensors"], expected_tensors(config)
    wrong += [f"tensor {name} is missing" for name in sorted(shapes.keys() - tensors.keys())]
    wrong += [
        f"tensor {name} is none of the model" for name in sorted(tensors.keys() - shapes.keys())
    ]
    wrong += [
        f"tensor {name} is {tensors[name]} and not {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and _sizes(tensors[name]) != _sizes(shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ExportError(f"the converter's file is wrong: {'; '.join(wrong[:3])}{more}")


def _is(found: Any, wanted: Any) -> bool:
    """Whether they are the same number, within float32, or list."""
    if isinstance(found, float):
        return isinstance(wanted, int | float) and abs(found - wanted) <= 1e-6 * abs(wanted)
    return found == wanted


def _sizes(shape: Any) -> list[int]:
    """A shape without the ones that lie beyond its last larger size, or between."""
    return [size for size in shape if size != 1]


def expected_keys(config: KimiLinearConfig, groups: int) -> dict[str, Any]:
    """What a GGUF's keys say of a configuration; None where a key must not be there."""
    linear, layers = config.linear_attn_config, config.layer_types
    has_experts = any(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.model_max_length,
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [int(kind == "full_attention") for kind in layers],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "ssm.conv_kernel": linear["short_conv_kernel_size"],
        "kda.head_dim": linear["head_dim"],
    }
    if has_experts:
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_token,
            "expert_gating_func": 2 if config.moe_router_activation_func == "sigmoid" else 1,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.num_shared_experts,
            "expert_weights_scale": config.routed_scaling_factor,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_group_count": groups or None,
        }
    if groups:
        keys["expert_group_used_count"] = config.topk_group
    return {"general.architecture": "kimi-linear"} | {PREFIX + k: v for k, v in keys.items()}


def expected_tensors(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    """Shape by name of a GGUF's tensors, the first dimension contiguous."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (hidden, config.vocab_size),
        "output.weight": (hidden, config.vocab_size),
        "output_norm.weight": (hidden,),
    }
    for index, kind in enumerate(config.layer_types):
        layer = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        layer |= _kda(config) if kind == "linear_attention" else _mla(config)
        layer |= _experts(config) if config.is_moe_layer(index) else _mlp(config)
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _kda(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    linear, hidden = config.linear_attn_config, config.hidden_size
    size, heads = linear["head_dim"], linear["num_heads"]
    wide, window = size * heads, linear["short_conv_kernel_size"]
    return {
        **{f"attn_{x}.weight": (hidden, wide) for x in "qkv"},
        **{f"ssm_conv1d_{x}.weight": (window, wide) for x in "qkv"},
        **{f"ssm_{x}_a.weight": (hidden, size) for x in "fg"},
        **{f"ssm_{x}_b.weight": (size, wide) for x in "fg"},
        "ssm_beta.weight": (hidden, heads),
        "ssm_a": (heads,),
        "ssm_dt.bias": (wide,),
        "ssm_norm.weight": (size,),
        "attn_output.weight": (wide, hidden),
    }


def _mla(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return {
        "attn_q.weight": (hidden, heads * (nope + rope)),
        "attn_kv_a_mqa.weight": (hidden, rank + rope),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (nope, rank, heads),
        "attn_v_b.weight": (rank, value, heads),
        "attn_output.weight": (heads * value, hidden),
    }


def _mlp(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "ffn_gate.weight": (hidden, inner),
        "ffn_up.weight": (hidden, inner),
        "ffn_down.weight": (inner, hidden),
    }


def _experts(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    shared = inner * config.num_shared_experts
    return {
        "ffn_gate_inp.weight": (hidden, count),
        "exp_probs_b.bias": (count,),
        "ffn_gate_exps.weight": (hidden, inner, count),
        "ffn_up_exps.weight": (hidden, inner, count),
        "ffn_down_exps.weight": (inner, hidden, count),
        "ffn_gate_shexp.weight": (hidden, shared),
        "ffn_up_shexp.weight": (hidden, shared),
        "ffn_down_shexp.weight": (shared, hidden),
    }


def check_vocabulary(keys: dict[str, Any], folder: Path) -> None:
    """Compare tokens, merges and special ids of a GGUF with the folder's tokenizer, and the ids
    that both give to `PROBE`.

    Args:
        keys: Value by key.
        folder: Of the model.

    Raises:
        ExportError: They differ.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = keys["tokenizer.ggml.tokens"]
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab(True).items()}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    if keys.get("tokenizer.ggml.pre") != "kimi-k2":
        raise ExportError(f"the file's pre-tokenizer is {keys.get('tokenizer.ggml.pre')!r}")
    if any(tokens[token_id] != token for token_id, token in by_id.items()):
        raise ExportError("the file's tokens are not the tokenizer's")
    if keys.get("tokenizer.ggml.add_bos_token") or keys.get("tokenizer.ggml.add_eos_token"):
        raise ExportError("the file has llama.cpp add tokens that the tokenizer does not add")
    settings = read_object(folder / "tokenizer_config.json")
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        wanted = None if token is None else tokenizer.token_to_id(token)
        found = keys.get(f"tokenizer.ggml.{'padding' if role == 'pad' else role}_token_id")
        if wanted is not None and found != wanted:
            raise ExportError(f"the file's {role}_token is {found} and not {wanted}")
    plain = len(tokenizer.get_vocab(False))
    written = Tokenizer(BPE({token: i for i, token in enumerate(tokens[:plain])}, merges))
    written.pre_tokenizer = make_pre_tokenizer()
    if written.encode(PROBE).ids != tokenizer.encode(PROBE).ids:
        raise ExportError("the file's vocabulary gives other ids to a text than the tokenizer")
    template = chat_template(folder)
    if template is not None and keys.get("tokenizer.chat_template") != template:
        raise ExportError("the file's chat template is not chat_template.jinja")


def chat_template(folder: Path) -> str | None:
    """A folder's chat template, for llama.cpp."""
    path = folder / "chat_template.jinja"
    return llama_template(path.read_text("utf-8")) if path.is_file() else None
