"""Snapshots brought to few bits while the model reads a text, layer by layer.

Each layer reads what the layers before it, in few bits already, have made of the text. One layer of
the model is in memory. After each layer the text's hidden states are saved beside the files, for a
run that goes on after a kill.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.checkpoints.experts import ExpertMatrix
from kimi_linear.checkpoints.packed import packed_entries
from kimi_linear.ops.packed.gptq import gptq
from kimi_linear.ops.packed.rounding import check_finite, quantize
from kimi_linear.ops.packed.weights import PackedWeights
from quantizing.calibration import Calibration
from quantizing.data_free import file_of
from quantizing.modules import quantize_layer
from quantizing.plan import EMBEDDING, Plan, Shard
from quantizing.reading import Batch, read_ahead
from quantizing.text import Text
from quantizing.writing import TensorFile

HEAD, NORM = "lm_head.weight", "model.norm.weight"
HIDDEN = "hidden"


def write_calibrated_shards(
    plan: Plan,
    draft: Path,
    device: torch.device,
    calibration: Calibration,
    read_bytes: int,
    progress: Any,
) -> None:
    """Write the files that are not there yet.

    Args:
        plan: What to do.
        draft: The folder to write to.
        device: Where to compute.
        calibration: The text.
        read_bytes: Bytes of weights that are read ahead.
        progress: A bar of the bytes to read, which is moved as they are done.
    """
    files = [file_of(plan, shard, draft) for shard in plan.shards]
    text = Text(_backbone(plan), calibration.positions, device)
    done = _take_up(files, text, draft)
    progress.update(sum(shard.size for shard in plan.shards[:done]))
    left = plan.shards[done:]
    with closing(read_ahead(left, read_bytes, is_pinned=device.type == "cuda")) as batches:
        for number, shard in enumerate(left, done):
            progress.set_description(shard.number)
            with files[number] as file:
                loaded = _load(plan, shard, batches, file, device, progress)
                for name, packed in _quantized(plan, shard, loaded, text, calibration):
                    for official, tensor in packed_entries(name, packed, is_fp8=plan.is_fp8):
                        file.write(official, tensor)
                del loaded
                if shard is not plan.shards[-1]:
                    text.save(_hidden_file(draft, number))
            _hidden_file(draft, number - 1).unlink(missing_ok=True)
    for path in draft.glob(f"{HIDDEN}-*"):  # a kill may have left one
        path.unlink()


def _backbone(plan: Plan) -> Any:
    model: Any = plan.model.eval()
    return model.base_model


def _hidden_file(draft: Path, number: int) -> Path:
    """Hidden states behind the shard of a number."""
    return draft / f"{HIDDEN}-{number + 1:05d}.safetensors"


def _take_up(files: list[TensorFile], text: Text, draft: Path) -> int:
    """The number of files that an earlier run has left, after which this one goes on."""
    done = next((i for i, file in enumerate(files) if not file.is_finished()), len(files))
    if done == len(files):
        return done
    hidden = _hidden_file(draft, done - 1)
    if done and not hidden.is_file():
        done = 0
    if done:
        text.load(hidden)
    return done


def _load(
    plan: Plan,
    shard: Shard,
    batches: Iterator[Batch],
    file: TensorFile,
    device: torch.device,
    progress: Any,
) -> dict[str, Tensor]:
    """A shard's tensors on the device, by the model's names; those to keep are written as well."""
    state, loaded = plan.model.state_dict(), {}
    missing = len(shard.sources)
    while missing:
        batch = next(batches)
        for source, numbers in zip(batch.sources, batch.numbers, strict=True):
            if source.scheme is None:
                file.write(source.name, numbers)
            else:
                check_finite(numbers, f"{source.block.path}: {source.name}")
            matrix = ExpertMatrix.from_name(source.name)
            name = matrix.fused_name if matrix else source.name
            if name not in state:
                continue
            if matrix is None:
                is_wide = name.endswith(plan.wide_names)
                loaded[name] = numbers.to(device, torch.float32 if is_wide else None, copy=True)
                continue
            if name not in loaded:
                shape = state[name].shape
                loaded[name] = torch.empty(shape, dtype=numbers.dtype, device=device)
            matrix.place(loaded[name]).copy_(numbers)
        missing -= len(batch.sources)
        progress.update(batch.numbers.nbytes)
        del batch, numbers
    return loaded


@torch.no_grad()
def _quantized(
    plan: Plan, shard: Shard, loaded: dict[str, Tensor], text: Text, calibration: Calibration
) -> Iterator[tuple[str, PackedWeights]]:
    """Names and packed weights of a shard; the text is read by it meanwhile."""
    if shard.layer is not None:
        name, layer = f"model.layers.{shard.layer}", text.backbone.layers[shard.layer]
        found = {each.removeprefix(f"{name}."): x for each, x in loaded.items()}
        layer.load_state_dict(found, assign=True)
        yield from quantize_layer(layer, name, text, plan.quantization)
        layer.to("meta")
        return
    schemes = plan.quantization.schemes
    if EMBEDDING in loaded:
        table, scheme = loaded[EMBEDDING], schemes["embeddings"]
        if scheme is not None:
            packed = quantize(table, scheme, EMBEDDING)
            yield EMBEDDING, packed
            table = packed
        text.hidden = torch.empty(*calibration.ids.shape, table.shape[1], dtype=table.dtype)
        for row, hidden in zip(calibration.ids, text.hidden, strict=True):
            hidden.copy_(F.embedding(row.to(table.device), table))
    if HEAD in loaded and schemes["head"] is not None:
        norm = text.backbone.norm
        norm.load_state_dict({"weight": loaded[NORM]}, assign=True)
        hessian = text.moment(lambda hidden, _: norm(hidden))
        yield HEAD, gptq(loaded[HEAD], hessian, schemes["head"], HEAD)
