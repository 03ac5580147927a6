"""Decoding as one recorded graph: when a call is one, and what it replays.

A forward of one token per row behind a cache is answered by `DecodeStep`, recorded once per model,
number of rows, and with or without padding, as a CUDA graph. The recording reads the cache's
tensors through a table of addresses, so it serves every cache, and caches of other steps read and
write the same tensors. Whatever the step does not cover runs layer by layer as ever.

The switch is the model's attribute `decode_backend`: "auto" takes the graph where it can and says
once why it cannot, "graph" insists on it, "eager" never takes it.

Shapes: B rows, S tokens of cache and call.
"""

import threading
import weakref
from collections import OrderedDict
from typing import Any, Literal, get_args

import torch
from kimi_linear.decode.step import TABLE_COLUMNS, DecodeStep
from kimi_linear.ops.runtime import SILU_MODULES, TritonError, power_of_two, triton
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import logging

logger = logging.get_logger(__name__)

DecodeBackend = Literal["auto", "graph", "eager"]
BACKENDS = get_args(DecodeBackend)
MAX_ROWS = 256
MAX_PAIRS = 2048  # of rows and experts
MAX_STEPS = 8  # recordings kept per model
# fields whose values a recording contains
CONSTANTS = ("num_experts_per_token", "routed_scaling_factor", "moe_renormalize")
# what only the layers themselves can hand out
RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")
DEVICE_TYPES = ("cuda",)
MIN_CAPABILITY = (8, 0)
PLAIN_MODULES = (nn.Linear, nn.Embedding, nn.ModuleList, *SILU_MODULES)
DTYPES = (torch.bfloat16, torch.float16)


def is_decode_step(
    config: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cache: Cache | None,
    others: dict[str, Any],
) -> bool:
    """Whether a call's arguments are those of a decode step: one token id per row, behind a cache
    of ours that holds some, and nothing asked for but logits."""
    if not isinstance(input_ids, Tensor) or inputs_embeds is not None or cache is None:
        return False
    if torch.compiler.is_compiling():
        return False
    if not input_ids.numel() or input_ids.shape[1:] != (1,):
        return False
    if any(x is not None and x is not False for x in others.values()):
        return False
    layers = getattr(cache, "layers", None)
    if not layers or not hasattr(layers[0], "step_table") or layers[0].num_tokens == 0:
        return False
    return not any(getattr(config, name, False) for name in RECORDED)


def can_decode(model: nn.Module, input_ids: Tensor, cache: Cache) -> bool:
    """Whether `decode_logits` may be asked for one token per row behind `cache`.

    Args:
        model: A `KimiLinearForCausalLM`.
        input_ids: [B, 1].
        cache: A cache of this model.

    Raises:
        ValueError: If `model.decode_backend` is unknown, or is "graph" and there is an obstacle.
    """
    backend: Any = model.decode_backend
    if backend not in BACKENDS:
        raise ValueError(f"decode_backend={backend!r} is not allowed: it must be one of {BACKENDS}")
    if backend == "eager" or torch.is_grad_enabled():
        return False
    decoder = _decoders.get(model)
    if decoder is None:
        decoder = _decoders[model] = _Decoder()
    reason = decoder.obstacle(model, input_ids, cache)
    if reason and backend == "graph":
        raise ValueError(f"decode_backend='graph' is not possible here: {reason}")
    if reason and input_ids.is_cuda:
        logger.warning_once(f"decoding runs layer by layer, not as one graph: {reason}")
    return not reason


def decode_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache
) -> Tensor | None:
    """Logits [B, 1, vocab_size] of one token per row behind `cache`, which takes the tokens in.

    Args:
        model: A `KimiLinearForCausalLM` that `can_decode` these.
        input_ids: [B, 1].
        attention_mask: [B, S]; None if all tokens are real.
        cache: A cache of this model.

    Returns:
        The logits, or None if this call has to run layer by layer.

    Raises:
        TritonError: If the kernels cannot be built and `model.decode_backend` is "graph".
    """
    decoder = _decoders[model]
    try:
        return decoder.step(model, input_ids, attention_mask, cache)
    except TritonError as error:  # sizes that do not fit the chip
        if model.decode_backend == "graph":
            raise
        decoder.give_up(f"its kernels cannot be built ({error})")
    can_decode(model, input_ids, cache)  # says so
    return None


class _Decoder:
    """The recordings of one model, and what was found out about it."""

    def __init__(self) -> None:
        self._steps: OrderedDict[tuple[int, bool], _Recording] = OrderedDict()
        self._lock = threading.Lock()
        self._cache: weakref.ref[Cache] | None = None
        self._table: list[list[int]] | None = None
        self._tensors: list[weakref.ref[Tensor] | None] = []  # that the table depends on
        self._recorded: list[Any] = []  # addresses and constants that recordings contain
        self._failure = self._obstacle = ""
        self._hooks: list[Any] = []
        self._width, self._has_dropout = 1, False
        self._mode = False
        self._device_type, self._dtype = "", torch.float32

    def give_up(self, reason: str) -> None:
        """Never try again with this model."""
        self._failure = reason

    def obstacle(self, model: nn.Module, input_ids: Tensor, cache: Cache) -> str:
        """Why this call cannot be a recorded step, or ""."""
        if self._cache is None or self._cache() is not cache:
            self._examine(model)
            self._cache, self._table = weakref.ref(cache), None
        if self._failure or self._obstacle:
            return self._failure or self._obstacle
        if any(self._hooks):
            return "a module has hooks"
        B = input_ids.shape[0]
        if B > MAX_ROWS or B * self._width > MAX_PAIRS:
            rows = min(MAX_ROWS, MAX_PAIRS // self._width)
            return f"the batch has {B} rows, the step takes up to {rows}"
        if torch.is_autocast_enabled(self._device_type):
            return "autocast is on"
        if model.training and self._has_dropout:
            return "attention_dropout is on"
        return ""

    def _examine(self, model: nn.Module) -> None:
        """Look at the whole model, once per cache: weights may have moved since the last one."""
        config: Any = model.config
        parameter = next(model.parameters())
        self._obstacle = model_obstacle(model)
        self._width = config.num_experts_per_token or 1
        self._has_dropout = bool(config.attention_dropout)
        self._device_type, self._dtype = parameter.device.type, parameter.dtype
        modules = list(model.modules())
        self._hooks = [m._forward_hooks for m in modules] + [m._forward_pre_hooks for m in modules]
        tensors = (*model.parameters(), *model.buffers())
        recorded = [x.data_ptr() for x in tensors] + [getattr(config, name) for name in CONSTANTS]
        if recorded != self._recorded:
            self._steps.clear()
            self._recorded = recorded

    def step(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache
    ) -> Tensor | None:
        """Logits [B, 1, vocab_size], or None if the cache is not ready for a step in place."""
        with self._lock:
            _move_anchors(cache)
            table = self._table_for(cache, input_ids.shape[0])
            if table is None:
                return None
            key = (input_ids.shape[0], attention_mask is not None)
            recording = self._steps.get(key) or self._record(model, key)
            self._steps.move_to_end(key)
            layers = cache.layers
            logged = next((n for x in layers if (n := getattr(x, "num_logged", None))), 0)
            logits = recording.run(input_ids, attention_mask, table, layers[0].num_tokens, logged)
            for layer in layers:
                layer.count_step()
        return logits.unsqueeze(1)

    def _record(self, model: nn.Module, key: tuple[int, bool]) -> "_Recording":
        recording = self._steps[key] = _Recording(model, *key)
        while len(self._steps) > MAX_STEPS:
            self._steps.popitem(last=False)
        return recording

    def _table_for(self, cache: Cache, num_rows: int) -> list[list[int]] | None:
        """Where the cache's tensors lie, with room for one token per row; None if not ready."""
        mode = torch.is_inference_mode_enabled()  # decides what may be written in place
        if self._table is not None and mode == self._mode and self._is_unchanged(cache, num_rows):
            return self._table
        self._table, self._mode = None, mode
        table = []
        for layer in cache.layers:
            row = layer.step_table(num_rows, self._dtype)
            if row is None:
                return None
            table.append(row + [0] * (TABLE_COLUMNS - len(row)))
        self._table = table
        tensors = [x for layer in cache.layers for x in layer.step_tensors(num_rows)]
        self._tensors = [None if x is None else weakref.ref(x) for x in tensors]
        return table

    def _is_unchanged(self, cache: Cache, num_rows: int) -> bool:
        tensors: list[Tensor | None] = []
        for layer in cache.layers:
            own = layer.step_tensors(num_rows)
            if own is None:
                return False
            tensors += own
        return len(tensors) == len(self._tensors) and all(
            x is (None if ref is None else ref())
            for x, ref in zip(tensors, self._tensors, strict=True)
        )


def _move_anchors(cache: Cache) -> None:
    """Make room in the logs of the KDA layers, which all hold the same tokens."""
    layers: list[Any] = [layer for layer in cache.layers if hasattr(layer, "move_anchor")]
    if layers and layers[0].is_anchor_due:
        for layer in layers:
            layer.move_anchor()


_decoders: weakref.WeakKeyDictionary[nn.Module, _Decoder] = weakref.WeakKeyDictionary()


def model_obstacle(model: nn.Module) -> str:
    """Why this model cannot decode by `DecodeStep`, or ""."""
    if triton is None:
        return "triton is not installed"
    device = next(model.parameters()).device
    if device.type not in DEVICE_TYPES:
        return f"the model is on {device.type!r}, it must be on one of {DEVICE_TYPES}"
    return (
        _chip_obstacle(device)
        or _size_obstacle(model.config)
        or _depth_obstacle(model)
        or _weight_obstacle(model)
    )


def _chip_obstacle(device: torch.device) -> str:
    """GPUs that the kernels are not made for."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return "this torch is not made for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU's compute capability {capability} is below {MIN_CAPABILITY}"
    return ""


def _size_obstacle(config: Any) -> str:
    """Sizes that the kernels do not take."""
    linear = config.linear_attn_config
    powers = {
        "linear_attn_config.head_dim": linear["head_dim"],
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
    }
    for name, size in powers.items():
        if size < 16 or size != power_of_two(size):
            return f"{name}={size} is no power of two of at least 16"
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if getattr(config, name) % 8:
            return f"{name}={getattr(config, name)} is no multiple of 8"
    if config.q_lora_rank is not None:
        return f"q_lora_rank={config.q_lora_rank} is not None"
    if config.num_expert_group != config.topk_group:
        return f"num_expert_group={config.num_expert_group} is not topk_group={config.topk_group}"
    if config.hidden_act != "silu":
        return f"hidden_act={config.hidden_act!r} is not 'silu'"
    if linear["short_conv_kernel_size"] < 2:
        return "linear_attn_config.short_conv_kernel_size is below 2"
    return ""


def _depth_obstacle(model: nn.Module) -> str:
    """An early exit, which a recording of all layers cannot make."""
    backbone: Any = model.get_submodule("model")
    count, used = len(backbone.layers), backbone.config.num_hidden_layers
    return "" if count == used else f"num_hidden_layers={used}, the model has {count}"


def _weight_obstacle(model: nn.Module) -> str:
    """Weights that the kernels cannot read: adapters, quantised, sharded, spread or unaligned."""
    first = next(model.parameters())
    device, dtype = first.device, first.dtype
    if dtype not in DTYPES:
        return f"the weights are {dtype}, they must be one of {DTYPES}"
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in PLAIN_MODULES and not kind.__name__.startswith("KimiLinear"):
            return f"{name} is a {kind.__name__}"
        if isinstance(module, nn.Linear) and module.bias is not None:
            return f"{name} has a bias"
        if name and "forward" in vars(module):
            return f"{name} has a forward of its own"
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", "dt_bias"))
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
        if parameter.device != device:
            return f"{name} is on {parameter.device}, others are on {device}"
        if parameter.dtype != (torch.float32 if wide else dtype):
            return f"{name} is {parameter.dtype}, others are {dtype}"
        if not parameter.is_contiguous() or parameter.data_ptr() % 16:
            return f"{name} is not contiguous from a multiple of 16 bytes"
    return ""


class _Recording:
    """A `DecodeStep` and its CUDA graph; on other devices it is launched each time."""

    def __init__(self, model: nn.Module, num_rows: int, has_padding: bool) -> None:
        # made in inference mode, buffers could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            self._step = DecodeStep(model, num_rows, has_padding)
            self._table: list[list[int]] = []
            self._counts: tuple[int, int] | None = None
            self._graph: torch.cuda.CUDAGraph | None = None
            self._stream: torch.cuda.Stream | None = None  # of the last run
            if self._step.device.type == "cuda":
                with torch.cuda.device(self._step.device):
                    self._record()

    def _record(self) -> None:
        """Run once, on scratch memory, so that all kernels are compiled; then record."""
        step = self._step
        scratch: dict[str, Tensor] = {}
        self._load_table(_scratch_table(step, scratch))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step.run()

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        table: list[list[int]],
        tokens: int,
        logged: int,
    ) -> Tensor:
        """Logits [B, vocab_size] behind a cache of `tokens` tokens, of which its logs hold some."""
        step = self._step
        if step.device.type != "cuda":
            self._load(input_ids, attention_mask, table, (tokens, logged))
            step.run()
            return step.logits.clone()
        assert self._graph is not None
        with torch.cuda.device(step.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)  # which may still use the same buffers
            self._stream = stream
            self._load(input_ids, attention_mask, table, (tokens, logged))
            self._graph.replay()
            return step.logits.clone()

    def _load(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        table: list[list[int]],
        counts: tuple[int, int],
    ) -> None:
        """Put a step's inputs where the kernels look for them."""
        step = self._step
        if table is not self._table:
            self._load_table(table)
        if self._counts != counts:
            for place, count in enumerate(counts):
                step.counters[place].fill_(count)
        self._counts = (counts[0] + 1, counts[1] + 1)  # as the step itself counts
        if attention_mask is not None:
            self._load_mask(attention_mask)
        step.ids.copy_(input_ids)

    def _load_table(self, table: list[list[int]]) -> None:
        self._step.table.copy_(torch.tensor(table, dtype=torch.int64))
        self._table = table

    def _load_mask(self, attention_mask: Tensor) -> None:
        """Copy the mask [B, S] to where the kernels look for it."""
        step, tokens = self._step, attention_mask.shape[1]
        if step.real_tokens.shape[1] < tokens:
            with torch.inference_mode(False):
                step.reserve_mask(2 * tokens)
        step.real_tokens[:, :tokens] = attention_mask != 0


def _scratch_table(step: DecodeStep, tensors: dict[str, Tensor]) -> list[list[int]]:
    """A table of memory to write to while a step is tried out, the same for all layers of a kind.

    `tensors` keeps it.
    """
    B, table = step.num_rows, []

    def address(name: str, *shape: int, dtype: torch.dtype) -> int:
        if name not in tensors:
            tensors[name] = torch.zeros(*shape, dtype=dtype, device=step.device)
        return tensors[name].data_ptr()

    for layer in step.layers:
        a = layer.self_attn
        if hasattr(a, "b_proj"):
            H, K, W = a.num_heads, a.head_dim, a.q_conv1d.weight.shape[-1]
            conv = address("conv", B, 3, H * K, W - 1, dtype=step.dtype)
            state = address("state", B, H, K, K, dtype=torch.float32)
            table.append([conv, state, 0, 0, 0, 0])
        else:
            width = a.latent_dim + a.shared_key_dim
            latent = address("latent", B, 1, width, dtype=step.dtype)
            table.append([0, 0, 0, latent, width, 0])
    return table


__all__ = ["DecodeBackend", "can_decode", "decode_logits", "is_decode_step", "model_obstacle"]
