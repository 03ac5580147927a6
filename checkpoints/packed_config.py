"""A checkpoint's `quantization_config`: how each of its matrices is held.

Three formats are read: compressed-tensors' `pack-quantized` (integers) and `float-quantized`
(float8), and `fp8` in blocks (DeepSeek-V3's). What would change weights or results, and is not
read, is refused by its name. Activations that the entry calls dynamic are quantised for products
with float8 weights (`Scheme.activation_scheme`); beside integers they stay in the model's dtype.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kimi_linear.checkpoints.packed import COMPRESSED_TENSORS, FORMATS, FP8
from kimi_linear.configuration_rules import require
from kimi_linear.schemes import ACTIVATION_SCHEMES, Scheme

METHODS = (COMPRESSED_TENSORS, FP8)
MIXED = "mixed-precision"
# What has its own meaning below, and what says nothing about weights.
READ = {
    COMPRESSED_TENSORS: {"config_groups", "format", "ignore", "quantization_status"},
    FP8: {"activation_scheme", "weight_block_size", "scale_fmt", "fmt"},
}
INFORMATIVE = {
    "quant_method",
    "version",
    "global_compression_ratio",
    "modules_to_not_convert",  # the files say which are float8
    "ignored_layers",
}
FORMATS_OF_FLOATS = ("float-quantized", "naive-quantized")  # of one layout


@dataclass(frozen=True)
class Group:
    """The modules that are held in one way.

    Attributes:
        name: Of the group in the configuration.
        targets: Names, "re:" and patterns, or names of classes.
        scheme: How.
        is_per_tensor: Whether a matrix has one scale, which all rows of `scheme` share.
        is_reordered: Whether files say which group an input belongs to (GPTQ's `actorder`).
    """

    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    is_per_tensor: bool = False
    is_reordered: bool = False


@dataclass(frozen=True)
class StoredSchemes:
    """How the matrices of a checkpoint are held.

    Attributes:
        groups: None if every float8 matrix is in the same blocks.
        ignore: Names, patterns and classes of modules that are held as they are.
        blocks: The scheme of `fp8`.
    """

    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    blocks: Scheme | None = None

    @property
    def is_fp8(self) -> bool:
        """Whether the method is `fp8`, of which the files say what is quantised."""
        return self.blocks is not None

    def group_of(self, name: str) -> Group | None:
        """What a module belongs to, by its name in the checkpoint; None if to no group."""
        if self.blocks is not None:
            return Group(FP8, (), self.blocks)
        kind = "Embedding" if name.endswith("embed_tokens") else "Linear"
        if _rank(name, kind, self.ignore) is not None:
            return None
        ranks = [(_rank(name, kind, group.targets), group) for group in self.groups]
        found = [(rank, i) for i, (rank, _) in enumerate(ranks) if rank is not None]
        return self.groups[min(found)[1]] if found else None


def _rank(name: str, kind: str, targets: tuple[str, ...]) -> int | None:
    """How closely targets match a module: 0 by its name, 1 by a pattern, 2 by its class."""
    if name in targets:
        return 0
    if any(t.startswith("re:") and re.match(t.removeprefix("re:"), name) for t in targets):
        return 1
    # the router is a class of its own, which "Linear" does not mean
    return 2 if kind in targets and not name.endswith(".block_sparse_moe.gate") else None


def stored_schemes(entry: Mapping[str, Any]) -> StoredSchemes:
    """Read an entry `quantization_config`.

    Args:
        entry: With the `quant_method` "compressed-tensors" or "fp8".

    Raises:
        ValueError: For what is not read; the message names field, value and what is allowed.
    """
    method = str(entry.get("quant_method"))
    require(method in METHODS, _named("quant_method"), method, f"one of {', '.join(METHODS)}")
    for field, value in entry.items():
        is_known = field in READ[method] or field in INFORMATIVE or not value
        require(is_known, _named(field), value, "left out or null: it is not read")
    return _fp8(entry) if method == FP8 else _compressed(entry)


def _named(field: str) -> str:
    return f"quantization_config.{field}"


def _fp8(entry: Mapping[str, Any]) -> StoredSchemes:
    activations, sizes = entry.get("activation_scheme", "dynamic"), entry.get("weight_block_size")
    allowed = "'dynamic', or null for activations in 16 bits"
    is_read = activations in ACTIVATION_SCHEMES
    require(is_read, _named("activation_scheme"), activations, allowed)
    kind = entry.get("fmt", "e4m3")
    require(kind == "e4m3", _named("fmt"), kind, "'e4m3'")
    field, allowed = _named("weight_block_size"), "two sizes, such as [128, 128]"
    are_sizes = isinstance(sizes, list | tuple) and len(sizes) == 2
    require(are_sizes, field, sizes, allowed)
    scheme = _block_scheme(field, sizes)
    return StoredSchemes(blocks=replace(scheme, activation_scheme=activations))


def _block_scheme(field: str, sizes: Any) -> Scheme:
    are_ints = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    require(are_ints, field, sizes, "two sizes, such as [128, 128]")
    return _scheme(field, bits=8, group=sizes[1], is_float=True, rows=sizes[0])


def _scheme(field: str, **fields: Any) -> Scheme:
    try:
        return Scheme(**fields)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _compressed(entry: Mapping[str, Any]) -> StoredSchemes:
    status = entry.get("quantization_status", "compressed")
    require(status == "compressed", _named("quantization_status"), status, "'compressed'")
    groups, ignore = entry.get("config_groups"), entry.get("ignore") or []
    is_filled = isinstance(groups, Mapping) and len(groups) > 0
    require(is_filled, _named("config_groups"), groups, "an object with at least one group")
    _check_targets(_named("ignore"), ignore)
    assert isinstance(groups, Mapping)
    found = [_group(name, group, entry.get("format")) for name, group in groups.items()]
    return StoredSchemes(tuple(filter(None, found)), tuple(ignore))


def _check_targets(field: str, targets: Any) -> None:
    are_names = isinstance(targets, list | tuple) and all(isinstance(t, str) for t in targets)
    require(are_names, field, targets, "a list of names, patterns ('re:...') and classes")
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise ValueError(
                    f"{field}: {target!r} is no regular expression ({error})"
                ) from None


def _group(name: str, group: Any, whole_format: Any) -> Group | None:
    field = _named(f"config_groups.{name}")
    allowed = "an object; presets by name are not read"
    require(isinstance(group, Mapping), field, group, allowed)
    for side in ("input_activations", "output_activations"):
        activations = group.get(side)
        is_dynamic = isinstance(activations, Mapping) and bool(activations.get("dynamic"))
        allowed = "null, or with dynamic=true"
        require(not activations or is_dynamic, f"{field}.{side}", activations, allowed)
    weights = group.get("weights")
    if weights is None:
        return None
    require(isinstance(weights, Mapping), f"{field}.weights", weights, "an object")
    _check_targets(f"{field}.targets", group.get("targets"))
    scheme, is_per_tensor = _weights(f"{field}.weights", weights)
    if scheme.is_float and _has_float8_inputs(group.get("input_activations")):
        scheme = replace(scheme, activation_scheme="dynamic")
    own = group.get("format")
    is_whole = own is None and whole_format != MIXED
    written, where = (whole_format, _named("format")) if is_whole else (own, f"{field}.format")
    allowed_formats = FORMATS_OF_FLOATS if scheme.is_float else (FORMATS[False],)
    kind = "float8" if scheme.is_float else "integers"
    allowed = f"{' or '.join(map(repr, allowed_formats))} for {kind}"
    require(written in allowed_formats, where, written, allowed)
    is_reordered = weights.get("actorder") in (True, "group", "dynamic")
    return Group(name, tuple(group["targets"]), scheme, is_per_tensor, is_reordered)


def _has_float8_inputs(activations: Any) -> bool:
    """Whether inputs are dynamic float8 numbers; other dynamic ones stay in 16 bits here."""
    return bool(activations) and (
        (activations.get("type"), activations.get("num_bits")) == ("float", 8)
    )


def _weights(field: str, weights: Mapping[str, Any]) -> tuple[Scheme, bool]:
    """The scheme, and whether a matrix has one scale only."""
    kind, strategy = weights.get("type", "int"), _strategy(weights)
    require(kind in ("int", "float"), f"{field}.type", kind, "'int' or 'float'")
    is_float, dynamic = kind == "float", weights.get("dynamic", False)
    require(dynamic is False, f"{field}.dynamic", dynamic, "false")
    strategies = ("group", "channel", *(("tensor", "block") if is_float else ()))
    allowed = f"one of {', '.join(strategies)}"
    require(strategy in strategies, f"{field}.strategy", strategy, allowed)
    if weights.get("scale_dtype") is not None:
        dtypes = ("torch.bfloat16", "torch.float16", "torch.float32")
        dtype = weights["scale_dtype"]
        require(dtype in dtypes, f"{field}.scale_dtype", dtype, f"one of {', '.join(dtypes)}")
    bits, is_symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    if strategy == "block":
        sizes = weights.get("block_structure")
        are_sizes = isinstance(sizes, list | tuple) and len(sizes) == 2
        require(are_sizes, f"{field}.block_structure", sizes, "two sizes, such as [128, 128]")
        require(bits == 8, f"{field}.num_bits", bits, "8 for floats")
        return _block_scheme(f"{field}.block_structure", sizes), False
    group = weights.get("group_size") if strategy == "group" else None
    if strategy == "group":
        require(isinstance(group, int), f"{field}.group_size", group, "a number of inputs")
    scheme = _scheme(
        field, bits=bits, group=group, is_float=is_float, is_symmetric=bool(is_symmetric)
    )
    return scheme, strategy == "tensor"


def _strategy(weights: Mapping[str, Any]) -> Any:
    """What is said, or what compressed-tensors takes a group's size for."""
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy is not None:
        return strategy
    return "tensor" if group is None else "channel" if group == -1 else "group"
