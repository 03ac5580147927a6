"""Sessions: a cache in a safetensors file, read back by another process.

The file holds what the layers of a cache hold, the ids that were read if they are given, and in its
metadata the model's dtype and fingerprint and a checksum of the tensors. Latents that serve all
rows are stored once. What `crop` needs is stored too. A file is trusted with nothing: names, types,
sizes and counts are held against the model before any of them reaches a cache.

Shapes: B batch, S tokens seen.
"""

import hashlib
import json
import os
import uuid
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from kimi_linear.cache.hybrid import KimiLinearCache, check_kinds, check_whole
from kimi_linear.cache.kda import KDALayerCache
from kimi_linear.cache.latents import LatentLayerCache
from kimi_linear.cache.state import KDAState

logger = logging.get_logger(__name__)

FORMAT = "kimi-linear-session-2"
FORMATS = (FORMAT, "kimi-linear-session-1")  # the first had no checksum
SAMPLES = 16
KDA_TENSORS = ("conv_state", "recurrent_state", "anchor_conv_state", "anchor_recurrent_state")
KDA_NUMBERS = ("num_tokens", "has_padding", "rollback_tokens", "num_logged", "is_stale")
LATENT_NUMBERS = ("num_tokens", "has_padding", "reserve_tokens", "offload_latents")
MAX_TOKENS = 1 << 40
FLAGS = {"has_padding", "is_stale", "offload_latents"}
# What crop can take back from a session that `read_session` begins: a question behind a long text.
SESSION_ROLLBACK_TOKENS = 1024


class Session(NamedTuple):
    """What a file holds: the cache, and the ids [B, S] that it has read, if they were given."""

    cache: KimiLinearCache
    input_ids: Tensor | None


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's and buffer's name, shape, dtype, and of a few of its values."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.numel() and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            places = torch.linspace(0, len(flat) - 1, SAMPLES, dtype=torch.float64).long()
            values = flat[places.to(flat.device)].to("cpu", torch.float64)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def save_session(
    path: str | os.PathLike[str], cache: Cache, model: Any, input_ids: Tensor | None = None
) -> None:
    """Write a cache to a file; an older file stays whole until the new one is.

    Args:
        path: The file, by custom `*.safetensors`.
        cache: A cache that `model` has written.
        model: The model.
        input_ids: [B, at least S], what the cache has read; its first S columns are stored.

    Raises:
        ValueError: If the cache is empty, not one of ours or one of another model, an error ended
            its last call, or the ids are too few.
    """
    layers = getattr(cache, "layers", [])
    if not layers or not all(hasattr(layer, "memory_bytes") for layer in layers):
        raise ValueError(f"cache={type(cache).__name__} is not allowed: it must be one of ours")
    check_kinds(cache, model.config)
    check_whole(cache)
    num_tokens = layers[0].num_tokens
    if num_tokens == 0:
        raise ValueError("cache is empty, which is not allowed: it must have read something")
    tensors: dict[str, Tensor] = {}
    numbers = []
    for i, layer in enumerate(layers):
        found, values = _layer_content(layer)
        tensors |= {f"layers.{i}.{name}": x.detach().contiguous() for name, x in found.items()}
        numbers.append(values)
    if input_ids is not None:
        if input_ids.ndim != 2 or input_ids.shape[1] < num_tokens:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, which is not allowed: it must have "
                f"a column for each of the cache's {num_tokens} tokens"
            )
        tensors["input_ids"] = input_ids[:, :num_tokens].contiguous()
    metadata = {
        "format": FORMAT,
        "dtype": str(model.dtype),
        "fingerprint": model_fingerprint(model),
        "layers": json.dumps(numbers),
    }
    part = Path(f"{path}.{uuid.uuid4().hex}.part")
    try:
        # a tensor that shares memory with another one cannot be saved
        copies = {name: x.to("cpu", copy=True) for name, x in tensors.items()}
        save_file(copies, part, metadata | {"checksum": _checksum(copies)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_session(path: str | os.PathLike[str], model: Any) -> Session:
    """Read a session, each layer's part to the device where the model has that layer.

    Raises:
        ValueError: If the file is not a session, or one of another model or dtype, or something in
            it is not as `save_session` writes it; the message names the field.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, model)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path={os.fspath(path)!r} is not a safetensors file: {error}") from error
    cache = KimiLinearCache(model.config)
    modules = getattr(model, model.base_model_prefix, model).layers
    try:
        numbers = json.loads(metadata["layers"])
        if metadata["format"] == FORMAT:
            _require(_checksum(tensors) == metadata["checksum"], "checksum", "that of its tensors")
        _check_content(cache, tensors, numbers, model)
    except (ValueError, KeyError) as error:
        raise ValueError(f"path={os.fspath(path)!r} is damaged: {error}") from error
    for i, (layer, values) in enumerate(zip(cache.layers, numbers, strict=True)):
        device = next(modules[i].parameters()).device
        prefix = f"layers.{i}."
        found = {
            name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)
        }
        _fill_layer(layer, found, values, device)
    input_ids = tensors.get("input_ids")
    return Session(cache, None if input_ids is None else input_ids.to(model.device))


def read_session(
    path: str | os.PathLike[str], model: Any, input_ids: Tensor, chunk_tokens: int = 2048
) -> KimiLinearCache:
    """A cache that has read all of `input_ids` but the last token; the file holds it afterwards,
    or a warning says why it does not.

    What the file's text and `input_ids` have in common at the beginning comes from the file, as far
    as its cache can go back; the rest is read now.

    Args:
        path: The file; it may not be there yet.
        model: The model.
        input_ids: [B, T], without padding.
        chunk_tokens: So many tokens are read at a time.

    Raises:
        ValueError: If the file is there and not a session of this model, or holds no ids.
    """
    text = input_ids[:, :-1]
    cache = KimiLinearCache(model.config, rollback_tokens=SESSION_ROLLBACK_TOKENS)
    kept = 0
    if os.path.exists(path):
        session = load_session(path, model)
        if session.input_ids is None:
            raise ValueError(
                f"path={os.fspath(path)!r} holds no input_ids, which is not allowed: they say what "
                "its cache has read"
            )
        kept = keep_prefix(session.cache, session.input_ids, input_ids)
        cache = session.cache if kept else cache
    if kept < text.shape[1]:
        with torch.no_grad():
            for part in text[:, kept:].split(chunk_tokens, dim=1):
                model(part, cache=cache, logits_to_keep=1)
        try:
            save_session(path, cache, model, text)
        except (OSError, SafetensorError) as error:  # a full disk must not cost what was read
            logger.warning(
                f"path={os.fspath(path)!r} was not written, so the text will be read again next "
                f"time: {error}"
            )
    return cache


def _check(path: str | os.PathLike[str], metadata: dict[str, str], model: Any) -> None:
    """ValueError unless the file is a session of this model."""
    name = os.fspath(path)
    if metadata.get("format") not in FORMATS:
        raise ValueError(
            f"path={name!r} has format {metadata.get('format')!r}, which is not allowed: it must "
            f"be {FORMAT!r}, as save_session writes it"
        )
    if metadata.get("dtype") != str(model.dtype):
        raise ValueError(
            f"path={name!r} is a session in {metadata.get('dtype')}, which is not allowed: the "
            f"model is in {model.dtype}"
        )
    if metadata.get("fingerprint") != model_fingerprint(model):
        raise ValueError(
            f"path={name!r} is a session of another model, which is not allowed: weights and sizes "
            "must be the same"
        )


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over the bytes of tensors on the CPU, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        flat = tensors[name].contiguous().reshape(-1)
        value = zlib.crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b"", value)
    return f"{value:08x}"


def _require(is_right: bool, field: str, allowed: str) -> None:
    if not is_right:
        raise ValueError(f"{field} is not allowed: it must be {allowed}")


def _check_content(
    cache: KimiLinearCache, tensors: dict[str, Tensor], numbers: Any, model: Any
) -> None:
    """ValueError unless all of a file is what `save_session` writes of a cache of this model."""
    config, left = model.config, dict(tensors)
    count = len(cache.layers)
    is_list = isinstance(numbers, list) and all(isinstance(each, dict) for each in numbers)
    _require(is_list and len(numbers) == count, "layers", f"a list of {count} objects")
    ids = left.pop("input_ids", None)
    total = numbers[0].get("num_tokens")
    rows = next((x.shape[0] for name, x in left.items() if name.endswith("_state")), None)
    rows = numbers[-1].get("num_rows") if rows is None else rows
    for i, (layer, values) in enumerate(zip(cache.layers, numbers, strict=True)):
        prefix, is_kda = f"layers.{i}.", isinstance(layer, KDALayerCache)
        _check_numbers(prefix, is_kda, values, total, config)
        own = {name: left.pop(name) for name in list(left) if name.startswith(prefix)}
        if is_kda:
            shapes = _kda_shapes(values["num_logged"] or 0, config)
            needed = {"conv_state", "recurrent_state", *(["log"] if values["num_logged"] else [])}
        else:
            width = config.kv_lora_rank + config.qk_rope_head_dim
            shapes = {f"latents.{n}": (None, width) for n in range(len(own))}
            needed = set(shapes)
            found = sum(x.shape[1] for x in own.values() if x.ndim == 3)
            _require(found == total, f"{prefix}num_tokens", f"its latents' {found}")
            _require(values["num_rows"] == rows, f"{prefix}num_rows", f"{rows}, as elsewhere")
        names = {name.removeprefix(prefix) for name in own}
        _require(needed <= names <= shapes.keys(), f"{prefix}*", f"some of {sorted(shapes)}")
        for name, x in own.items():
            shape = shapes[name.removeprefix(prefix)]
            dtype = torch.float32 if name.endswith("recurrent_state") else model.dtype
            fits = x.ndim == len(shape) + 1 and x.shape[0] in ((rows,) if is_kda else (1, rows))
            fits = fits and all(n in (None, m) for n, m in zip(shape, x.shape[1:], strict=True))
            _require(fits and x.dtype == dtype, name, f"{dtype} of [{rows}, {shape}]")
    _require(not left, ", ".join(left), "left out")
    if ids is not None:
        fits = ids.dtype == torch.int64 and ids.shape == (rows, total)
        fits = fits and bool(((ids >= 0) & (ids < config.vocab_size)).all())
        _require(fits, "input_ids", f"int64 of [{rows}, {total}] below {config.vocab_size}")


def _kda_shapes(num_logged: int, config: Any) -> dict[str, tuple[int | None, ...]]:
    """Sizes without rows of what a KDA layer stores."""
    linear = config.linear_attn_config
    H, K, W = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    conv, state = (3, H * K, W - 1), (H, K, K)
    shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(KDA_TENSORS, state)
    shapes |= {"conv_state": conv, "anchor_conv_state": conv}
    return shapes | {"log": (num_logged, config.hidden_size)}


def _check_numbers(prefix: str, is_kda: bool, values: Any, total: Any, config: Any) -> None:
    """ValueError unless a layer's numbers are there, and nothing else, within their bounds."""
    names = {*KDA_NUMBERS} if is_kda else {*LATENT_NUMBERS, "num_rows"}
    _require(values.keys() == names, f"{prefix}*", f"{sorted(names)}")
    for name, value in values.items():
        if name in FLAGS:
            _require(isinstance(value, bool), prefix + name, "true or false")
        elif not (name == "num_logged" and value is None):
            _require(type(value) is int and value >= 0, prefix + name, "a number of at least 0")
    fits = 0 < values["num_tokens"] == total <= MAX_TOKENS
    _require(fits, f"{prefix}num_tokens", f"from 1 to {MAX_TOKENS}, the same in all layers")
    most = max(config.model_max_length, total)
    for name in ("rollback_tokens", "reserve_tokens", "num_logged"):
        limit = total if name == "num_logged" else most
        _require((values.get(name) or 0) <= limit, prefix + name, f"at most {limit}")


def _layer_content(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A layer's tensors and numbers, by the names that a file has for them."""
    if isinstance(layer, KDALayerCache):
        layer.settle()
        own, rollback = layer.state, layer.rollback
        states = (own.conv, own.recurrent, rollback.anchor.conv, rollback.anchor.recurrent)
        tensors = {**dict(zip(KDA_TENSORS, states, strict=True)), "log": rollback.logged()}
        numbers = (layer.num_tokens, layer.has_padding, rollback.tokens, rollback.num_logged)
        found = {name: x for name, x in tensors.items() if x is not None}
        return found, dict(zip(KDA_NUMBERS, (*numbers, layer.is_stale), strict=True))
    found = {f"latents.{i}": x for i, x in enumerate(layer.segments())}
    return found, {name: getattr(layer, name) for name in (*LATENT_NUMBERS, "num_rows")}


def _fill_layer(
    layer: Any, tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device
) -> None:
    """The inverse of `_layer_content`."""
    if isinstance(layer, KDALayerCache):
        x = {name: tensor.to(device) for name, tensor in tensors.items()}
        rollback = layer.rollback
        layer.state = KDAState(x["conv_state"], x["recurrent_state"])
        rollback.anchor = KDAState(x.get("anchor_conv_state"), x.get("anchor_recurrent_state"))
        rollback.log, rollback.num_logged = x.get("log"), numbers["num_logged"]
        rollback.tokens, layer.is_stale = numbers["rollback_tokens"], numbers["is_stale"]
    else:
        assert isinstance(layer, LatentLayerCache)
        target = torch.device("cpu") if numbers["offload_latents"] else device
        latents = [tensors[f"latents.{i}"].to(target) for i in range(len(tensors))]
        layer.fill(latents, numbers["num_rows"])
        layer.reserve_tokens = numbers["reserve_tokens"]
        layer.offload_latents = numbers["offload_latents"]
    layer.num_tokens, layer.has_padding = numbers["num_tokens"], numbers["has_padding"]
    layer.is_initialized = True


def common_prefix(cached_ids: Tensor, input_ids: Tensor) -> int:
    """How many leading columns of two [B, ...] tensors are the same in all rows."""
    if cached_ids.shape[0] != input_ids.shape[0]:
        return 0
    length = min(cached_ids.shape[1], input_ids.shape[1])
    same = cached_ids[:, :length].to(input_ids.device) == input_ids[:, :length]
    return int(same.all(dim=0).cumprod(0).sum())


def keep_prefix(cache: Cache, cached_ids: Tensor, input_ids: Tensor) -> int:
    """Crop the cache to its common prefix with `input_ids`, or empty it if it cannot.

    At least one column of `input_ids` is left to be read.

    Args:
        cache: A cache of ours.
        cached_ids: [B, at least S], what it has read.
        input_ids: [B, T], what is to be continued.

    Returns:
        How many tokens the cache still holds.
    """
    num_tokens = cache.layers[0].num_tokens
    kept = min(common_prefix(cached_ids, input_ids), num_tokens, input_ids.shape[1] - 1)
    try:
        if kept > 0:
            cache.crop(kept)
            return kept
    except ValueError:
        pass  # the tokens to take back are more than it keeps
    cache.reset()
    return 0
