"""Weights in few bits as other engines read them: names, layout, and `quantization_config`.

Integers are written as compressed-tensors' `pack-quantized`, float8 numbers as `float-quantized`,
or as `fp8` (DeepSeek-V3's) where all large matrices are in blocks and activations dynamic. Experts
get their matrices' own names. `docs/quantization_files.md` has the tables.

| scheme            | tensors of the matrix NAME                                                  |
|-------------------|-----------------------------------------------------------------------------|
| integers          | `weight_packed` int32 [N, ceil(K bits / 32)], `weight_scale` [N, G],        |
|                   | `weight_shape` int64 [2]; with zeros `weight_zero_point` int32              |
|                   | [ceil(N bits / 32), G]                                                      |
| float8            | `weight` float8_e4m3fn [N, K], `weight_scale` [N, G] (blocks: [N / R, G])   |
| float8, all parts | `weight`, `weight_scale_inv` [N / R, G]                                     |

Shapes: N outputs, K inputs, G groups of a row, R rows that share a scale.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_linear.checkpoints.bits import num_words, to_words
from kimi_linear.checkpoints.experts import FUSED, FUSED_IN, split_names
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.configuration_quantization import PARTS, KimiLinearQuantizationConfig
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import ceil_div
from kimi_linear.schemes import FLOAT8_BLOCK, Scheme

COMPRESSED_TENSORS, FP8 = "compressed-tensors", "fp8"
FLOAT8 = torch.float8_e4m3fn
# What `fp8` has a name for: linear layers, neither head nor embedding.
LINEAR_PARTS = ("experts", "shared_experts", "attention")
FORMATS = {False: "pack-quantized", True: "float-quantized"}
_PART_ORDER = [*PARTS, None]
_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not made yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def packed_entries(
    name: str, weights: PackedWeights, *, is_fp8: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand in a checkpoint for weights of the model.

    Args:
        name: The parameter's name in the model: "...q_proj.weight", or of fused experts
            "...experts.gate_up_proj", which gives each expert's matrices.
        weights: [N, K], or of experts [E, N, K].
        is_fp8: Whether `compressed_config` says `quant_method: "fp8"`.

    Yields:
        Names and tensors, made one after another on the weights' device.

    Raises:
        ValueError: If rows that share a scale belong to two matrices of an expert.
    """
    for entry in entries(name, weights, is_fp8=is_fp8):
        yield entry.name, entry.make()


def entries(name: str, weights: PackedWeights, *, is_fp8: bool = False) -> Iterator[Entry]:
    """As `packed_entries`, of tensors that are made when they are asked for."""
    names = [official for official, _ in split_names(name, tuple(weights.shape))]
    if weights.dim() == 2:
        yield from _of_matrix(names[0], tuple(weights.shape), weights, lambda: weights, is_fp8)
        return
    check_matrices(name, weights)
    num_kinds = len(names) // len(weights)
    rows = weights.shape[1] // num_kinds
    for i, official in enumerate(names):
        make = partial(_part, weights, i // num_kinds, i % num_kinds * rows, rows)
        yield from _of_matrix(official, (rows, weights.shape[2]), weights, make, is_fp8)


def check_matrices(name: str, weights: PackedWeights) -> None:
    """See `packed_entries`, which raises this ValueError."""
    num_kinds, shared = len(FUSED.get(name.rpartition(".")[2], ())), weights.scheme.rows
    if weights.dim() == 3 and num_kinds > 1 and weights.shape[1] // num_kinds % shared:
        raise ValueError(
            f"{name}: rows={shared} is not allowed: it must divide the "
            f"{weights.shape[1] // num_kinds} rows of each of the {num_kinds} matrices that an "
            "expert has there"
        )


def _part(weights: PackedWeights, expert: int, start: int, num_rows: int) -> PackedWeights:
    """Some rows of an expert's matrix."""
    rows, shared = slice(start, start + num_rows), weights.scheme.rows
    columns = slice(start // shared, ceil_div(start + num_rows, shared))
    zero = None if weights.zero is None else weights.zero[expert][:, columns]
    return PackedWeights(
        tuple(plane[expert][rows] for plane in weights.planes),
        weights.scale[expert][:, columns],
        zero,
        weights.scheme,
        weights.shape[-1],
        weights.dtype,
    )


def _of_matrix(
    official: str,
    shape: tuple[int, ...],
    like: PackedWeights,
    make: Callable[[], PackedWeights],
    is_fp8: bool,
) -> Iterator[Entry]:
    """The entries of a matrix that `make` returns and that is held as `like` is."""
    stem, scheme, (rows, num_inputs) = official.removesuffix(".weight"), like.scheme, shape
    groups, scale_rows = scheme.num_groups(num_inputs), rows
    if scheme.is_float:
        yield Entry(f"{stem}.weight", shape, FLOAT8, lambda: _float8(make()))
        scale_rows = ceil_div(rows, written(scheme).rows)
    else:
        bits, words = scheme.bits, (rows, num_words(num_inputs, scheme.bits))
        packed = f"{stem}.weight_packed"
        yield Entry(packed, words, torch.int32, lambda: to_words(make().codes(), bits))
    name, sizes, kind = (
        f"{stem}.weight_scale{'_inv' * is_fp8}",
        (scale_rows, groups),
        _kind_of(like),
    )
    yield Entry(name, sizes, kind, lambda: _by_row(make().scales(), scheme, scale_rows).to(kind))
    if not scheme.is_float:
        yield Entry(f"{stem}.weight_shape", (2,), torch.int64, lambda: torch.tensor(shape))
    if like.zero is not None:
        words = (num_words(rows, scheme.bits), groups)
        yield Entry(f"{stem}.weight_zero_point", words, torch.int32, lambda: _zeros(make(), rows))


def _kind_of(weights: PackedWeights) -> torch.dtype:
    """The dtype of scales in files: the weights', if no scale is rounded in it."""
    held, wanted = weights.scale.dtype, weights.dtype
    return wanted if torch.promote_types(held, wanted) == wanted else held


def _float8(matrix: PackedWeights) -> Tensor:
    return matrix.codes().contiguous().view(FLOAT8)


def _zeros(matrix: PackedWeights, num_rows: int) -> Tensor:
    """[ceil(N bits / 32), G]: zeros are packed along the outputs."""
    zeros = matrix.zeros()
    assert zeros is not None
    by_row = _by_row(zeros.to(torch.uint8), matrix.scheme, num_rows)
    return to_words(by_row.t(), matrix.scheme.bits).t().contiguous()


def _by_row(by_row: Tensor, scheme: Scheme, num_rows: int) -> Tensor:
    """[N / R, G] to [N, G] where formats have a scale for each row."""
    if num_rows != by_row.shape[0]:
        by_row = by_row.repeat_interleave(scheme.rows, dim=0)[:num_rows]
    return by_row.contiguous()


def _is_in_blocks(scheme: Scheme) -> bool:
    """Whether files have one scale for a block of rows and inputs."""
    return scheme.is_float and scheme.rows > 1 and scheme.group is not None


# ---- quantization_config -------------------------------------------------------------------------


def compressed_config(
    quantization: KimiLinearQuantizationConfig, config: KimiLinearConfig
) -> dict[str, Any]:
    """The entry `quantization_config` of `config.json` beside weights that are held as
    `quantization` says.

    Args:
        quantization: How each part is held.
        config: The model's configuration.

    Returns:
        What vLLM and compressed-tensors read: a dict of JSON's types, the same every time. Its
        `quant_method` is "compressed-tensors" or "fp8"; `packed_entries` wants to be told.

    Raises:
        ValueError: If no part is held in few bits.
    """
    return config_of({name: quantization.scheme_of(name) for name in module_names(config)})


def module_names(config: KimiLinearConfig) -> Iterator[str]:
    """Names of the modules that hold matrices, in the model's order; a layer's experts are one."""
    yield "model.embed_tokens"
    query = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_b_proj")
    attention = {
        "linear_attention": (
            *("q_proj", "k_proj", "v_proj", "f_a_proj", "f_b_proj", "b_proj"),
            *("g_a_proj", "g_b_proj", "o_proj"),
        ),
        "full_attention": (*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    }
    mlp = ("gate_proj", "up_proj", "down_proj")
    for i, kind in enumerate(config.layer_types):
        layer = f"model.layers.{i}"
        yield from (f"{layer}.self_attn.{name}" for name in attention[kind])
        if not config.is_moe_layer(i):
            yield from (f"{layer}.mlp.{name}" for name in mlp)
            continue
        yield from (f"{layer}.block_sparse_moe.{name}" for name in ("gate", "experts"))
        if config.num_shared_experts:
            yield from (f"{layer}.block_sparse_moe.shared_experts.{name}" for name in mlp)
    if not config.tie_word_embeddings:
        yield "lm_head"


def config_of(schemes: dict[str, Scheme | None]) -> dict[str, Any]:
    """The entry for a model.

    Args:
        schemes: How each module that has a matrix holds it; None: as it is. By the modules' names,
            and of experts by "...experts", or by "...experts.gate_up_proj" and
            "...experts.down_proj".

    Raises:
        ValueError: If nothing is held in few bits.
    """
    held = {name: s and written(s) for name, s in _by_matrix(schemes)}
    found = [each for each in dict.fromkeys(held.values()) if each is not None]
    if not found:
        raise ValueError("no weights are in few bits, and quantization_config has nothing to say")
    plain = [name for name, scheme in held.items() if scheme is None]
    if is_fp8(held):
        return {
            "quant_method": FP8,
            "activation_scheme": "dynamic",
            "weight_block_size": [found[0].rows, found[0].group],
            "modules_to_not_convert": plain,
        }
    names = {scheme: [name for name in held if held[name] == scheme] for scheme in found}
    found.sort(key=lambda scheme: min(_PART_ORDER.index(part_of(name)) for name in names[scheme]))
    formats = [FORMATS[scheme.is_float] for scheme in found]
    is_mixed = len(set(formats)) > 1
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "mixed-precision" if is_mixed else formats[0],
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": _targets(names[scheme], held),
                "weights": _weights_of(scheme),
                "input_activations": _activations_of(scheme),
                "output_activations": None,
                **({"format": formats[i]} if is_mixed else {}),
            }
            for i, scheme in enumerate(found)
        },
        "ignore": _targets(plain, held),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def is_fp8(held: dict[str, Scheme | None]) -> bool:
    """Whether `quant_method: "fp8"` says all: each large matrix of the layers, and nothing else, is
    in the same blocks of float8, and many rows of activations are quantised too."""
    schemes = {held[name] for name in held if part_of(name) in LINEAR_PARTS}
    others = [held[name] for name in held if part_of(name) not in LINEAR_PARTS]
    scheme = schemes.pop() if len(schemes) == 1 else None
    if scheme is None or any(others):
        return False
    return _is_in_blocks(scheme) and scheme.activation_scheme is not None


def part_of(name: str) -> str | None:
    """The part that a matrix belongs to, by the checkpoint's name without ".weight"."""
    if ".experts." in name:
        return "experts"
    last = name.rpartition(".")[2]
    return next((part for part, modules in PARTS.items() if last in modules), None)


def written(scheme: Scheme) -> Scheme:
    """As files hold it: only float8 blocks have scales that rows share."""
    return scheme if _is_in_blocks(scheme) else replace(scheme, rows=1)


def _by_matrix(schemes: dict[str, Scheme | None]) -> Iterator[tuple[str, Scheme | None]]:
    """With experts' matrices by their kinds: "...experts.*.w1"."""
    for name, scheme in schemes.items():
        stem, _, last = name.rpartition(".")
        if last == "experts":
            yield from ((f"{name}.*.{kind}", scheme) for kind in FUSED_IN)
        elif last in FUSED and stem.endswith(".experts"):
            yield from ((f"{stem}.*.{kind}", scheme) for kind in FUSED[last])
        else:
            yield name, scheme


def _weights_of(scheme: Scheme) -> dict[str, Any]:
    strategy = "channel" if scheme.group is None else "group"
    found: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.is_float else "int",
        "symmetric": scheme.is_symmetric,
        "strategy": strategy,
        "group_size": scheme.group,
        "dynamic": False,
    }
    if _is_in_blocks(scheme):
        blocks = {"block_structure": [scheme.rows, scheme.group], "group_size": None}
        found |= {"strategy": "block", **blocks}
    return found


def _activations_of(scheme: Scheme) -> dict[str, Any] | None:
    """What the format says of inputs; theirs are quantised by token where weights' are by row."""
    if scheme.activation_scheme is None:
        return None
    is_by_block = scheme.group is not None
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group" if is_by_block else "token",
        "group_size": FLOAT8_BLOCK if is_by_block else None,
        "dynamic": True,
    }


# vLLM asks for experts by these names, whatever the checkpoint calls them, and joins these two.
_OTHER_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_JOINED = {"gate_proj", "up_proj"}, "gate_up_proj"


def _targets(names: list[str], held: dict[str, Scheme | None]) -> list[str]:
    """What names these modules and no others: of each kind of which all are among them a pattern
    for all layers, of others one for each layer."""
    kinds: dict[str, list[str]] = {}
    for name in held:
        kinds.setdefault(_kind(name), []).append(name)
    chosen = set(names)
    leaves: dict[str, list[str]] = {}  # by what stands before them
    for name in names:
        stem, _, last = name.removesuffix(".*").rpartition(".")
        stem = stem.removesuffix(".*")
        parent = stem.rpartition(".")[2]
        if not _LAYER.search(name):
            prefix = name
        elif chosen.issuperset(kinds[_kind(name)]):
            prefix = rf"re:.*\.{parent}"
        else:
            prefix = f"re:{re.escape(stem)}"
        found = leaves.setdefault(prefix, [])
        if prefix != name and last not in found:
            found.append(last)
    return [_target(prefix, found) for prefix, found in leaves.items()]


def _kind(name: str) -> str:
    """A module's name without the layer's number."""
    return _LAYER.sub(".layers.", name)


def _target(prefix: str, leaves: list[str]) -> str:
    if not leaves:
        return prefix
    between = ""
    if prefix.endswith(".experts"):
        between = r"\..*"
        leaves = leaves + [_OTHER_NAMES[leaf] for leaf in leaves]
    elif _JOINED[0].issubset(leaves):
        leaves = [*leaves, _JOINED[1]]
    last = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
    return rf"{prefix}{between}\.{last}$"
