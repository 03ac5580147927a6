"""Checkpoints in few bits as others make them, written here by the formats' definitions."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from builders import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.ops.packed.weights import PackedWeights

# Two layers; groups of 128 divide all inputs.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 128,
    "v_head_dim": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "linear_attn_config": {
        "full_attn_layers": [2],
        "num_heads": 2,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
    "num_experts": 5,
    "moe_intermediate_size": 128,
}
MATRICES = (
    *("embed_tokens", "lm_head", "_proj", "_with_mqa", ".w1", ".w2", ".w3"),
    ".block_sparse_moe.gate",
)


def bit_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] bit by bit behind each other, in int32 [N, ceil(K bits / 32)]."""
    each = (codes[..., None].long() >> torch.arange(bits)) & 1
    flat = each.flatten(1)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (padded << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def integers(
    weight: Tensor, bits: int = 4, group: int | None = 128, symmetric: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix' tensors of `pack-quantized`, and the weights they stand for."""
    rows, num_inputs = weight.shape
    size = group or num_inputs
    groups = weight.float().unflatten(1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    top = (1 << bits) - 1
    if symmetric:
        scale, zero = groups.abs().amax(-1) * 2 / top, torch.full_like(low, 1 << (bits - 1))
    else:
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(0, top)
    scale = scale.to(weight.dtype)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    wide = ((codes - zero[..., None]) * scale.float()[..., None]).flatten(1).to(weight.dtype)
    parts = {
        "weight_packed": bit_words(codes.flatten(1), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, num_inputs]),
    }
    if not symmetric:
        parts["weight_zero_point"] = bit_words(zero.t(), bits).t().contiguous()
    return parts, wide


def floats(
    weight: Tensor,
    strategy: str = "channel",
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype | None = None,
    name: str = "weight_scale",
) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix' tensors of `float-quantized` or `fp8`, and the weights they stand for."""
    rows, num_inputs = weight.shape
    size = {"channel": (1, num_inputs), "tensor": (rows, num_inputs), "block": block}[strategy]
    shape = (math.ceil(rows / size[0]), math.ceil(num_inputs / size[1]))
    scale = torch.zeros(shape)
    wide = torch.zeros(rows, num_inputs)
    codes = torch.zeros(rows, num_inputs, dtype=torch.float8_e4m3fn)
    for i in range(shape[0]):
        for j in range(shape[1]):
            at = (
                slice(i * size[0], (i + 1) * size[0]),
                slice(j * size[1], (j + 1) * size[1]),
            )
            largest = (weight[at].float().abs().amax() / 448).to(scale_dtype or weight.dtype)
            scale[i, j] = largest
            codes[at] = (weight[at].float() / largest.float()).to(torch.float8_e4m3fn)
            wide[at] = codes[at].float() * largest.float()
    scale = scale.to(scale_dtype or weight.dtype)
    return {"weight": codes, name: scale}, wide.to(weight.dtype)


def write_stored(
    folder: Path,
    entry: dict[str, Any],
    hold: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor] | None],
    model: KimiLinearForCausalLM | None = None,
    **fields: Any,
) -> dict[str, Tensor]:
    """Write a checkpoint.

    Args:
        folder: Where; new.
        entry: Its `quantization_config`.
        hold: A matrix' tensors and what they stand for, by its name without ".weight" and its
            weights; None leaves it.
        model: Whose weights; None: a small one of `fields`.

    Returns:
        The weights that are to be read, by official names.
    """
    model = model or tiny_model(**{**SIZES, **fields}).to(torch.bfloat16)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, weight in list(state.items()):
        stem = name.removesuffix(".weight")
        found = hold(stem, weight) if stem.endswith(MATRICES) and stem != name else None
        if found is None:
            stored[name] = weight
            continue
        stored |= {f"{stem}.{part}": x for part, x in found[0].items()}
        state[name] = found[1]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    set_entry(folder, entry)
    return state


def set_entry(folder: Path, entry: dict[str, Any] | None) -> None:
    """Give `config.json` another `quantization_config`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = entry
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder with one file."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file({n: x.contiguous() for n, x in state.items()}, path, metadata={"format": "pt"})


def pack_quantized(**weights: Any) -> dict[str, Any]:
    """An entry as llm-compressor writes it, of one group."""
    args = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": {**args, **weights},
        "input_activations": None,
        "output_activations": None,
        "format": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.13.0",
    }


def float_quantized(**weights: Any) -> dict[str, Any]:
    """The same for float8, whose activations are brought to float8 on the way."""
    entry = pack_quantized(
        **{"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None, **weights}
    )
    entry["format"] = "float-quantized"
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    entry["config_groups"]["group_0"]["input_activations"] = activations
    return entry


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def official_state(model: KimiLinearForCausalLM) -> dict[str, Tensor]:
    """A model's weights in full, by official names."""
    found: dict[str, Tensor] = {}
    for name, x in model.state_dict().items():
        wide = x.dequantized() if isinstance(x, PackedWeights) else x
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = wide
            continue
        for expert, matrices in enumerate(wide):
            kinds = ("w1", "w3") if last == "gate_up_proj" else ("w2",)
            for kind, matrix in zip(kinds, matrices.chunk(len(kinds)), strict=True):
                found[f"{stem}.{expert}.{kind}.weight"] = matrix
    return found


def packed_names(model: KimiLinearForCausalLM) -> set[str]:
    """The model's names of packed weights."""
    return {name for name, x in model.state_dict().items() if isinstance(x, PackedWeights)}
