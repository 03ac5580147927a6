"""Decoding as one recorded graph: when a call is a step of it, and what that replays.

A forward of up to `STEP_TOKENS` tokens per row behind a cache is answered by a `DecodeStep`,
recorded as a CUDA graph once per model, number of rows and tokens, and with or without padding. The
recording reads the cache's tensors through a table of addresses, so it serves every cache, and
caches of other steps read and write the same tensors. Of a model that several processes have
together (tensor parallelism) each records the step of its part (`divided.py`). What the step does
not cover runs layer by layer.

The switch is the model's attribute `decode_backend`: "auto" takes the graph where it can, "graph"
raises where model or call have an obstacle, "eager" never takes it. (Of several processes' model
"auto" does not take it either: one that cannot would wait for others that do.) Calls run layer
by layer

- without a word, because they are no step: other arguments than ids, mask and cache, outputs that
  arguments or the configuration ask of layers, more tokens, an empty cache, gradients, a compiler
  at work (`try_decode`, `_is_step`);
- with one log line: what `obstacles.py` finds in the model and the call, hooks, kernels that cannot
  be built;
- without a word, because this step cannot write in place: a padded new token; a cache of padded
  texts whose tokens were taken back, whose log is full, or that is offloaded (the caches'
  `prepare_step`).

A text's first call of one row is none of these: `prompts.py` has a graph of it (`try_prompt`).

Shapes: B rows, T new tokens of each, S tokens of cache and call.
"""

import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from kimi_linear.cache.hybrid import prepare_cache
from kimi_linear.cache.kda import KDALayerCache
from kimi_linear.cache.latents import LatentLayerCache
from kimi_linear.cache.pending import STEP_TOKENS
from kimi_linear.cache.pool import TextPool
from kimi_linear.decode.addresses import (
    AddressTable,
    Counters,
    PoolTable,
    counters,
    is_kda,
    prepare,
)
from kimi_linear.decode.obstacles import Part, Snapshot, call_obstacle, examine_part, model_obstacle
from kimi_linear.decode.prompts import MOST_TOKENS, RecordedPrompts
from kimi_linear.decode.recording import Recording, StepKind
from kimi_linear.decode.step import DecodeStep
from kimi_linear.inputs.checks import check_columns, unless_all_real
from kimi_linear.ops.runtime import TritonError, is_traced, power_of_two, triton
from kimi_linear.parallel.own_part import has_divided_parameters
from kimi_linear.upstream.interfaces import attention_backend

logger = logging.get_logger(__name__)

DecodeBackend = Literal["auto", "graph", "eager"]
BACKENDS = get_args(DecodeBackend)
# recordings kept per model: those of all numbers of tokens, or of requests with drafts, and some
MAX_STEPS = 32
# what a step reads, or what has no effect on it
STEP_ARGUMENTS = {"input_ids", "attention_mask", "cache", "position_ids", "use_cache"}
# what only the layers themselves can hand out
LAYER_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


def try_decode(model: nn.Module, inputs: dict[str, Any], others: dict[str, Any]) -> Tensor | None:
    """Answer a call by a recorded step if it is one.

    Args:
        model: A `KimiLinearForCausalLM`.
        inputs: What its backbone would be given, by name. A step has `input_ids` [B, T] and a
            `cache` of this model, which takes the tokens in, and may have an `attention_mask`
            [B, S]; `position_ids` and `use_cache` have no effect on it.
        others: The call's further arguments, by name.

    Returns:
        Logits [B, T or `logits_to_keep`, vocab_size], or None: run layer by layer.

    Raises:
        ValueError: If cache or mask contradict the call, `model.decode_backend` is unknown, or is
            "graph" and there is an obstacle.
        TritonError: If the kernels cannot be built and `model.decode_backend` is "graph".
    """
    config: Any = model.config
    input_ids, cache = inputs["input_ids"], inputs["cache"]
    if not _is_step(input_ids, cache, {**inputs, **others}):
        return None
    if any(getattr(config, name, False) for name in LAYER_OUTPUTS):
        return None
    cache = prepare_cache(cache, config)
    backend: Any = model.decode_backend
    if backend not in BACKENDS:
        raise ValueError(f"decode_backend={backend!r} is not allowed: it must be one of {BACKENDS}")
    if backend == "eager" or torch.is_grad_enabled():
        return None
    decoder = _decoders.get(model) or _decoders.setdefault(model, _Decoder())
    num_rows, num_tokens = input_ids.shape
    if num_tokens > 1 and call_obstacle(model, num_rows * num_tokens):
        return None
    if reason := decoder.obstacle(model, num_rows * num_tokens, cache):
        if backend == "graph":
            raise ValueError(f"decode_backend='graph' is not possible here: {reason}")
        _warn(input_ids, reason)
        return None
    attention_mask = inputs["attention_mask"]
    mask = unless_all_real(attention_mask)
    check_columns(attention_mask, cache.get_seq_length(), num_tokens)
    if mask is not None and not bool((mask[:, -num_tokens:] != 0).all()):
        return None  # a new token is padding
    cache.note_padding(attention_mask, mask)
    cache.is_torn = True
    try:
        logits = decoder.step(model, input_ids, mask, cache)
    except TritonError as error:  # sizes that do not fit the chip
        if backend == "graph":
            raise
        decoder.failure = f"its kernels cannot be built ({error})"
        _warn(input_ids, decoder.failure)
        logits = None
    cache.is_torn = False
    kept = others["logits_to_keep"]
    return logits if logits is None else logits[:, -kept:]


def try_prompt(model: nn.Module, inputs: dict[str, Any], others: dict[str, Any]) -> Tensor | None:
    """Answer a text's first call by a recorded graph, see `prompts.py`; arguments and result as
    those of `try_decode`. The cache takes the tokens in."""
    input_ids, cache = inputs["input_ids"], inputs["cache"]
    if not _is_prompt(model, input_ids, cache, {**inputs, **others}):
        return None
    cache = prepare_cache(cache, model.config)
    decoder = _decoders.get(model) or _decoders.setdefault(model, _Decoder())
    if decoder.prompt_obstacle(model, cache):
        return None
    mask, positions = inputs["attention_mask"], inputs["position_ids"]
    for given in (mask, positions):  # the layers say what is wrong with others
        if given is not None and getattr(given, "shape", None) != input_ids.shape:
            return None
    begins = positions is not None and bool((positions.diff(dim=1) <= 0).any())
    if begins or unless_all_real(mask) is not None:
        return None
    return decoder.read(model, input_ids, cache, others["logits_to_keep"])


def _is_prompt(model: Any, input_ids: Any, cache: Any, given: dict[str, Any]) -> bool:
    """Whether a call has one row of ids, behind an empty cache of ours that cannot be cropped, and
    asks for nothing but logits."""
    if not isinstance(input_ids, Tensor) or cache is None or is_traced():
        return False
    if input_ids.ndim != 2 or len(input_ids) != 1 or input_ids.device != model.device:
        return False
    is_long = STEP_TOKENS < input_ids.shape[1] <= MOST_TOKENS
    if not is_long or input_ids.dtype not in (torch.int64, torch.int32):
        return False
    if given["use_cache"] is False or not _asks_for_logits(given):
        return False
    if model.training or torch.is_grad_enabled() or model.decode_backend not in ("auto", "graph"):
        return False
    if attention_backend(model.config) != "sdpa" or not model.model.planner.has_all_tokens:
        return False
    if any(getattr(model.config, name, False) for name in LAYER_OUTPUTS):
        return False
    if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    layers: list[Any] = getattr(cache, "layers", [])
    return bool(layers) and all(map(_takes_prompt, layers))


def _takes_prompt(layer: Any) -> bool:
    if type(layer) not in (KDALayerCache, LatentLayerCache) or layer.num_tokens:
        return False
    is_left_out = layer.is_croppable if is_kda(layer) else layer.offload_latents
    return not (is_left_out or layer.has_padding)


def _asks_for_logits(given: dict[str, Any]) -> bool:
    """Whether a call's arguments ask for nothing else, of its last tokens or of all."""
    for name in given.keys() - STEP_ARGUMENTS:
        x = given[name]
        is_last_tokens = name == "logits_to_keep" and isinstance(x, int)
        if x is not None and x is not False and not is_last_tokens:
            return False
    return True


def _is_step(input_ids: Any, cache: Any, given: dict[str, Any]) -> bool:
    """Whether a call has a few token ids per row, behind a cache of ours that holds some, and asks
    for nothing but logits."""
    if not isinstance(input_ids, Tensor) or cache is None or torch.compiler.is_compiling():
        return False
    if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= STEP_TOKENS or not len(input_ids):
        return False
    if not _asks_for_logits(given):
        return False
    layers = getattr(cache, "layers", None) or [None]
    return hasattr(layers[0], "step_tensors") and layers[0].num_tokens > 0


def _warn(input_ids: Tensor, reason: str) -> None:
    """Say once why a call on a GPU is no step."""
    if input_ids.is_cuda:
        logger.warning_once(f"decoding runs layer by layer, not as one graph: {reason}")


class _Decoder:
    """The recordings of one model's steps and prompts, and what stands against them.

    Attributes:
        failure: Why it never works, once that is known.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._is_divided = False  # among several processes
        self._part: Part | None = None  # of a divided model, once it was asked for
        self._obstacle = ""
        self._steps: OrderedDict[StepKind, Recording] = OrderedDict()
        self._prompts = RecordedPrompts()
        self._tables: WeakKeyDictionary[Cache, AddressTable | None] = WeakKeyDictionary()
        self._pool_tables: WeakKeyDictionary[TextPool, PoolTable] = WeakKeyDictionary()

    def obstacle(self, model: nn.Module, num_rows: int, cache: Cache) -> str:
        """Why this call cannot be a recorded step, or ""."""
        if triton is None:
            return "triton is not installed"
        if self.failure:
            return self.failure
        with self._lock:
            snapshot = self._snapshot
            # a cache seen for the first time: look closely
            look = Snapshot.is_current if cache in self._tables else Snapshot.is_same
            if snapshot is None or not look(snapshot, model):
                snapshot = self._examine(model)
            self._tables.setdefault(cache, None)
            if self._is_divided and model.decode_backend == "auto":
                return "several processes have the model, which decode_backend='graph' records"
            if self._is_divided and self._part is None and not self._obstacle:
                self._part, self._obstacle = examine_part(model)
        if self._obstacle:
            return self._obstacle
        return "a module has hooks" if snapshot.has_hooks else call_obstacle(model, num_rows)

    def _examine(self, model: nn.Module) -> Snapshot:
        """Look at the whole model, and drop recordings of what it was before."""
        before, self._snapshot = self._snapshot, Snapshot(model)
        if before is not None and before.recorded != self._snapshot.recorded:
            self._steps.clear()
            self._prompts.clear()
        self._part, self._is_divided = None, has_divided_parameters(model)
        self._obstacle = "" if self._is_divided else model_obstacle(model)
        return self._snapshot

    def step(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache
    ) -> Tensor | None:
        """Logits [B, T, vocab_size], or None if the cache is not ready for a step in place."""
        num_rows, num_tokens = input_ids.shape
        kda: list[Any] = [layer for layer in cache.layers if is_kda(layer)]
        with self._lock:
            if kda and kda[0].is_stale and _can_catch_up(cache):
                catch_up(self._own(model).model, cache)
            if kda and kda[0].is_anchor_due(num_tokens):  # all their logs hold the same tokens
                for layer in kda:
                    layer.move_anchor(num_tokens)
            table = self._tables.get(cache)
            if table is None or not table.is_current(cache, num_rows, num_tokens):
                dtype = next(model.parameters()).dtype
                table = self._tables[cache] = prepare(cache, num_rows, num_tokens, dtype)
            if table is None:
                return None
            counts = counters(cache.layers[0], kda)
            is_pending = num_tokens > 1 or any(x.pending.updates is not None for x in kda[:1])
            kind = StepKind(num_rows, attention_mask is not None, num_tokens, is_pending)
            logits = self._recording(model, kind).run(input_ids, attention_mask, table, counts)
            for layer in cache.layers:
                layer.count_step(num_tokens)
        return logits

    def step_pool(
        self, model: nn.Module, pool: TextPool, rows: list[int], ids: Tensor
    ) -> Tensor | None:
        """Logits [texts, T, vocab_size] of more tokens of each of these texts, ids [texts, T];
        their pages have room for them. The number of rows is rounded up, so that few steps are
        recorded. None if the model has an obstacle by now."""
        size, num_tokens = power_of_two(len(rows)), ids.shape[1]
        spare, kind = size - len(rows), _pool_kind(pool, size, num_tokens)
        counts = [Counters(pool.lengths[row], pending=pool.pending[row], row=row) for row in rows]
        counts += [Counters(row=pool.num_rows)] * spare
        places = torch.tensor(counts, dtype=torch.int64)
        with self._lock:
            if not self._is_ready(model):
                return None
            table = self._pool_tables.get(pool)
            if table is None:
                table = self._pool_tables[pool] = PoolTable(pool)
            padded = F.pad(ids, (0, 0, 0, spare))
            logits = self._recording(model, kind).run(padded, None, table, places)
        for row in rows:
            pool.count(row, num_tokens)
        return logits[: len(rows)]

    def prompt_obstacle(self, model: nn.Module, cache: Cache) -> str:
        """Why no text is read by a recording, or ""."""
        reason = self.obstacle(model, 1, cache)
        return reason or ("several processes have the model" if self._is_divided else "")

    def read(self, model: Any, input_ids: Tensor, cache: Any, kept: int) -> Tensor | None:
        """Logits [1, T or `kept`, vocab_size] of a text's first tokens; None: layer by layer."""
        with self._lock:
            hidden = self._prompts.read(model, input_ids, cache)
            return None if hidden is None else model.lm_head(hidden[:, -kept:])

    def record_pool(self, model: nn.Module, pool: TextPool, num_rows: int) -> None:
        """Record the step of one token of so many of its texts."""
        kind = _pool_kind(pool, power_of_two(num_rows))
        with self._lock:
            if self._is_ready(model):
                self._recording(model, kind)

    def _is_ready(self, model: nn.Module) -> bool:
        """Whether the model, as it is now, has no obstacle to steps of a pool."""
        snapshot = self._snapshot
        if snapshot is None or not snapshot.is_current(model):
            snapshot = self._examine(model)
        return not (self.failure or self._obstacle or snapshot.has_hooks)

    def _own(self, model: nn.Module) -> Part:
        """What this process has of the model."""
        return Part(model) if self._part is None else self._part

    def _recording(self, model: nn.Module, kind: StepKind) -> Recording:
        """That of a kind of step, made if there is none; the one that was asked for last stays
        longest."""
        if kind not in self._steps:
            own = self._own(model)
            self._steps[kind] = Recording(own.model, kind, own.group)
            while len(self._steps) > MAX_STEPS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(kind)
        return self._steps[kind]

    def has_recorded(self, num_rows: int) -> bool:
        """Whether steps of `num_rows` rows without padding ran as a graph."""
        return StepKind(num_rows) in self._steps


def _pool_kind(pool: TextPool, size: int, num_tokens: int = 1) -> StepKind:
    return StepKind(size, num_tokens=num_tokens, is_pending=True, page_tokens=pool.page_tokens)


def _can_catch_up(cache: Cache) -> bool:
    """Whether a step in place can follow: a text without padding, all of it on the device."""
    layers: list[Any] = cache.layers
    return not any(x.has_padding or getattr(x, "offload_latents", False) for x in layers)


def catch_up(model: nn.Module, cache: Cache) -> None:
    """Bring the states of a cache whose tokens were taken back to its last token."""
    backbone: Any = model.model
    for module, layer in zip(backbone.layers, cache.layers, strict=True):
        if is_kda(layer):
            layer.catch_up(module.self_attn)


_decoders: WeakKeyDictionary[nn.Module, _Decoder] = WeakKeyDictionary()


def pool_obstacle(model: nn.Module, num_rows: int) -> str:
    """Why texts of a pool cannot decode by recorded steps of up to `num_rows` rows, or ""."""
    backend: Any = model.decode_backend
    if backend == "eager":
        return "decode_backend is 'eager'"
    if reason := model_obstacle(model) or call_obstacle(model, num_rows):
        return reason
    if Snapshot(model).has_hooks:
        return "a module has hooks"
    decoder = _decoders.get(model)
    return "" if decoder is None else decoder.failure


def decode_pool(model: nn.Module, pool: TextPool, rows: list[int], ids: Tensor) -> Tensor | None:
    """Read one more token of some texts of a pool, or several, by a recorded step.

    Args:
        model: A `KimiLinearForCausalLM` that `pool_obstacle` had nothing against.
        pool: Made for it.
        rows: Of the pool, in any order, each once; their pages have room for the tokens.
        ids: [texts] or [texts, T] int64.

    Returns:
        Logits [texts, vocab_size] or [texts, T, vocab_size], or None: `pool_obstacle` has something
        against the model now, and nothing is read.

    Raises:
        ValueError: For more tokens than a step takes, or than the pool can take back.
    """
    if ids.ndim == 1:
        logits = decode_pool(model, pool, rows, ids[:, None])
        return None if logits is None else logits[:, 0]
    if call_obstacle(model, 1):
        return None
    num_tokens, most = ids.shape[1], pool.rollback_tokens or STEP_TOKENS
    if not 1 <= num_tokens <= most:
        raise ValueError(
            f"ids has {num_tokens} tokens a text, which is not allowed: there must be 1 to {most} "
            f"(rollback_tokens={pool.rollback_tokens})"
        )
    if num_tokens > 1 and (reason := call_obstacle(model, power_of_two(len(rows)) * num_tokens)):
        raise ValueError(f"ids has shape {[*ids.shape]}, which is not allowed: {reason}")
    decoder = _decoders.get(model) or _decoders.setdefault(model, _Decoder())
    try:
        return decoder.step_pool(model, pool, rows, ids)
    except TritonError as error:  # sizes that do not fit the chip
        decoder.failure = f"its kernels cannot be built ({error})"
        return None


def record_pool(model: nn.Module, pool: TextPool, num_rows: int) -> None:
    """Record what `decode_pool` replays for one token of `num_rows` texts, which wait for compilers
    otherwise; nothing where that finds an obstacle. Arguments as there."""
    if call_obstacle(model, 1):
        return
    decoder = _decoders.get(model) or _decoders.setdefault(model, _Decoder())
    with suppress(TritonError):  # a step of so many rows may never come
        decoder.record_pool(model, pool, num_rows)


def drop_recordings(model: nn.Module) -> None:
    """Forget a model's recordings; the next call records anew. Those of NCCL's sums have to be gone
    before their group of processes is destroyed."""
    _decoders.pop(model, None)


def recorded_steps(model: nn.Module) -> list[DecodeStep]:
    """The steps of a model that ran as a graph, the last one last."""
    decoder = _decoders.get(model)
    return [] if decoder is None else [x.step for x in decoder._steps.values()]


def has_recording(model: nn.Module, num_rows: int) -> bool:
    """Whether calls of one token for each of `num_rows` rows, without padding, ran as a graph."""
    decoder = _decoders.get(model)
    return decoder is not None and decoder.has_recorded(num_rows)
