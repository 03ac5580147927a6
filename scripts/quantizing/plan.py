"""What a run does, known before it reads a weight: each tensor's place in the snapshot, how it is
to be held, and the files that it goes to, of which each has a layer.

Experts stand in the order in which a batch takes them: the first matrices of some experts, then
their second ones.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from publishing.folder import CONFIG, empty_model, read_architecture, read_config
from transformers import PreTrainedModel

from kimi_linear.checkpoints.experts import FUSED_IN, ExpertMatrix, split_names
from kimi_linear.checkpoints.files import DTYPES, StoredBlock, read_blocks
from kimi_linear.checkpoints.folders import INDEX, check_weights, weight_files
from kimi_linear.checkpoints.names import official_shapes, own_name
from kimi_linear.checkpoints.packed import FP8, compressed_config, entries
from kimi_linear.checkpoints.pretrained import AUTO_MAP
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme

ALLOWED = ("F32", "F16", "BF16")
# Experts whose matrices are read one after another.
EXPERTS_TOGETHER = 8
EMBEDDING = "model.embed_tokens.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
# safetensors' names of dtypes.
NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
ITEM_SIZES = {name: dtype.itemsize for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Source:
    """A tensor of the snapshot.

    Attributes:
        name: Its official name, or where the model has no place for it, its own.
        block: Where it is.
        scheme: How it is to be held; None: as it is.
    """

    name: str
    block: StoredBlock
    scheme: Scheme | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.block.dtype]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What those have in common that can be worked on together."""
        return self.scheme, self.block.shape, self.block.dtype

    def written(self, is_fp8: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Names, shapes and safetensors' dtypes of the tensors that it becomes."""
        if self.scheme is None:
            yield self.name, self.block.shape, self.block.dtype
            return
        like = PackedWeights.empty(self.block.shape, self.scheme, self.dtype, "meta")
        for entry in entries(self.name, like, is_fp8=is_fp8):
            yield entry.name, entry.shape, NAMES[entry.dtype]


@dataclass(frozen=True)
class Shard:
    """A file to write, and what goes into it."""

    name: str
    layer: int | None  # None: what is in no layer
    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(source.block.size for source in self.sources)

    @property
    def number(self) -> str:
        """Which of how many, for a progress bar."""
        return self.name.removeprefix("model-").removesuffix(".safetensors")


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    folder: Path
    fields: dict[str, Any]  # of the snapshot's config.json
    model: PreTrainedModel  # on the meta device
    quantization: KimiLinearQuantizationConfig
    entry: dict[str, Any]  # of the new config.json
    shards: tuple[Shard, ...] = field(repr=False)

    @property
    def config(self) -> KimiLinearConfig:
        return self.model.config

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(shard.size for shard in self.shards)

    @property
    def wide_names(self) -> tuple[str, ...]:
        """Ends of the names of tensors that the model has in float32."""
        return tuple(self.model._keep_in_fp32_modules_strict or ())

    @property
    def is_fp8(self) -> bool:
        return self.entry["quant_method"] == FP8

    @property
    def files(self) -> list[Path]:
        """Of the snapshot."""
        return [self.folder / name for name in weight_files(self.folder) if name != INDEX]


def make_plan(snapshot: Path, quantization: KimiLinearQuantizationConfig) -> Plan:
    """Check a snapshot, and plan what becomes of it; only headers are read.

    Raises:
        ValueError: The snapshot is incomplete, does not fit its config, or is quantised already, or
            a tensor cannot be held as `quantization` says; the message names file or tensor, the
            value, and what is allowed.
    """
    fields = read_config(snapshot)
    for name in ("quantization_config", "compression_config"):
        if fields.get(name) is not None:
            method = (fields[name] or {}).get("quant_method")
            raise ValueError(
                f"{snapshot / CONFIG}: {name} is there (quant_method={method!r}): the snapshot is "
                "quantised already; allowed: one in 16 or 32 bits"
            )
    model = empty_model(fields, read_architecture(snapshot, fields))
    _check_tied(model.config, quantization)
    # before shapes are compared: packed tensors have others
    files = [snapshot / name for name in weight_files(snapshot) if name != INDEX]
    for path in files:
        _check_dtypes(path)
    check_weights(snapshot, model)
    sources = list(_sources(files, model, quantization))
    for source in sources:
        if source.scheme is not None:
            _check_source(source)
    return Plan(
        snapshot,
        fields,
        model,
        quantization,
        compressed_config(quantization, model.config),
        tuple(_shards(sources, model.config.num_hidden_layers)),
    )


def _check_tied(config: KimiLinearConfig, quantization: KimiLinearQuantizationConfig) -> None:
    head, embeddings = (quantization.schemes[part] for part in ("head", "embeddings"))
    if config.tie_word_embeddings and head != embeddings:
        raise ValueError(
            f"head={head} is not allowed: with tie_word_embeddings it is the embedding, and must "
            f"be held as that is, {embeddings}"
        )


def _check_dtypes(path: Path) -> None:
    for name, block in read_blocks(str(path)).items():
        if block.dtype not in ALLOWED:
            raise ValueError(
                f"{path}: tensor {name} is in {block.dtype}, as of a snapshot that is quantised "
                f"already; allowed: weights in {', '.join(ALLOWED)}"
            )


def _check_source(source: Source) -> None:
    """Whether groups of inputs, and rows that share scales, are whole in a matrix."""
    scheme, matrix = source.scheme, ExpertMatrix.from_name(source.name)
    assert scheme is not None
    rows, num_inputs = source.block.shape
    scheme.check_size(source.name, num_inputs)
    if matrix and matrix.kind != "w2" and rows % scheme.rows:  # two stand together in the model
        raise ValueError(
            f"{source.name}: rows={scheme.rows} is not allowed: it must divide its {rows} rows"
        )


def _sources(
    files: Iterable[Path], model: PreTrainedModel, quantization: KimiLinearQuantizationConfig
) -> Iterator[Source]:
    """The tensors under their official names, experts one by one."""
    official, fused = official_shapes(model), dict(model.state_dict())
    for path in files:
        for name, block in read_blocks(str(path)).items():
            prefix = model.base_model_prefix
            own = own_name(name, official, prefix) or own_name(name, fused, prefix) or name
            if own in fused and own not in official:
                if model.config.tie_word_embeddings and own == "lm_head.weight":
                    continue  # which is the embedding
                yield from _taken_apart(own, block, quantization)
                continue
            matrix = ExpertMatrix.from_name(own)
            module = matrix.prefix[:-1] if matrix else own.removesuffix(".weight")
            is_held = own in official and own.endswith(".weight")
            yield Source(own, block, quantization.scheme_of(module) if is_held else None)


def _taken_apart(
    name: str, block: StoredBlock, quantization: KimiLinearQuantizationConfig
) -> Iterator[Source]:
    """The matrices of experts that a file holds in one tensor."""
    scheme, start = quantization.scheme_of(name.rpartition(".")[0]), block.start
    for official, shape in split_names(name, block.shape):
        size = torch.Size(shape).numel() * DTYPES[block.dtype].itemsize
        part = replace(block, start=start, size=size, shape=shape)
        yield Source(official, part, scheme)
        start += size


def _shards(sources: list[Source], num_layers: int) -> Iterator[Shard]:
    """The embedding, each layer, and what comes after them."""
    parts: dict[int, list[Source]] = {}
    for source in sources:
        parts.setdefault(_place(source.name, num_layers), []).append(source)
    for number, place in enumerate(sorted(parts), 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        layer = place if 0 <= place < num_layers else None
        yield Shard(name, layer, tuple(sorted(parts[place], key=_order)))


def _place(name: str, num_layers: int) -> int:
    layer = LAYER.match(name)
    if layer:
        return int(layer[1])
    return -1 if name == EMBEDDING else num_layers


def _order(source: Source) -> tuple[Any, ...]:
    """What is no expert's first, by name; then some experts at a time."""
    matrix = ExpertMatrix.from_name(source.name)
    if matrix is None:
        return 0, source.name
    together = matrix.expert // EXPERTS_TOGETHER
    return 1, matrix.prefix, together, FUSED_IN[matrix.kind] == "down_proj", matrix.expert


def config_text(plan: Plan) -> str:
    """The new `config.json`."""
    fields = {**plan.fields, "auto_map": AUTO_MAP, "quantization_config": plan.entry}
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def index_text(plan: Plan) -> str:
    """The index of all files."""
    places, total = {}, 0
    for shard in plan.shards:
        for source in shard.sources:
            for name, shape, dtype in source.written(plan.is_fp8):
                places[name] = shard.name
                total += num_bytes(shape, dtype)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(content, indent=2) + "\n"


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Of a tensor, whose dtype is one of `NAMES`."""
    return torch.Size(shape).numel() * ITEM_SIZES[dtype]
