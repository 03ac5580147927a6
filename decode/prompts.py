"""Reading a prompt as one recorded graph.

A prompt has some 1,200 kernels. To launch them takes the host as long as the GPU needs for some
thousand tokens, whatever their number. So a text's first call, of one row and up to `MOST_TOKENS`
tokens, replays a CUDA graph that was recorded for its number of tokens, rounded up: what stands
behind the text gets no decay and a beta of 0 in KDA layers, and no token of the text attends to it.

A recording holds memory of its own. So one is made when a size comes for the second time, and where
a GPU has some memory left. All share a pool, from which each takes what the others do not hold, and
stay until the model changes or `drop_recordings`.

With the model's `decode_backend` "eager" none is made. Calls run layer by layer without a word,
with "graph" too, where a recording would not do: behind a cache that holds tokens or from which
`crop` can take some back, with padding or several rows, in training, with gradients, with another
attention or other experts than the usual, where more than logits is asked for, and the first time
that a text of such a size comes. Its rounding is another one than the layers': products of other
numbers of rows.

Shapes: T tokens of the text, P of the recording, D hidden size, L + P width of a latent.
"""

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from kimi_linear.cache.pending import STEP_TOKENS
from kimi_linear.cache.pieces import KDAPieces
from kimi_linear.cache.state import KDAState
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.layers.plan import ForwardPlan
from kimi_linear.ops.experts.packed import FLOAT8_TOKENS
from kimi_linear.ops.experts.prefill import can_prefill
from kimi_linear.ops.packed.library import block_scales
from kimi_linear.ops.projections import MANY_ROWS
from kimi_linear.ops.runtime import TritonError, ceil_div, power_of_two
from kimi_linear.upstream.interfaces import experts_backend

logger = logging.get_logger(__name__)

# Longer texts keep a GPU busy for longer than the host needs.
MOST_TOKENS = 4096
# A recording is for a multiple of this many tokens. From 512 on, its texts have at most an eighth
# less.
MULTIPLE = 64
# From these numbers of tokens on, float8 weights are multiplied by float8 activations: no recording
# is for more where a text has fewer.
FLOAT8_LIMITS = (FLOAT8_TOKENS, MANY_ROWS)
# Of a GPU's memory, what is left when one is made.
FREE_SHARE = 0.2


def recorded_tokens(num_tokens: int) -> int:
    """P: the tokens of the recording that reads a text of T."""
    step = max(MULTIPLE, power_of_two(num_tokens) // 16)
    size = ceil_div(num_tokens, step) * step
    for limit in FLOAT8_LIMITS:
        if num_tokens < limit <= size:
            size = limit - 1
    return size


def least_tokens(size: int) -> int:
    """T of the shortest text that a recording of P reads."""
    shorter = range(size - 1, STEP_TOKENS, -1)
    return 1 + next((n for n in shorter if recorded_tokens(n) != size), STEP_TOKENS)


@dataclass(frozen=True)
class PromptPlan(ForwardPlan):
    """The plan of a text's first call, which keeps what caches take over afterwards.

    Attributes:
        states: After the last token, by KDA layer.
        latents: [1, P, L + P], by MLA layer.
    """

    states: dict[int, KDAState] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)

    def read_kda(self, attention: Any, hidden_states: Tensor) -> Tensor:
        out, self.states[attention.layer_idx], _ = attention.attend(
            hidden_states, self.layout, KDAState()
        )
        return out

    def keep_latents(self, layer_idx: int, latent: Tensor) -> list[Any]:
        self.latents[layer_idx] = latent
        return [latent]


class RecordedPrompt:
    """The first call of texts of `least_tokens(P)` to P tokens; recorded on CUDA alone.

    Args:
        model: A `KimiLinearForCausalLM`.
        size: P.
        pool: Of the memory that recordings share; None elsewhere than on CUDA.
    """

    def __init__(self, model: Any, size: int, pool: Any) -> None:
        self.backbone, device = model.model, model.device
        # made in inference mode, buffers could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            self.ids = torch.zeros(1, size, dtype=torch.int64, device=device)
            self.counts = torch.full((1,), size, dtype=torch.int64, device=device)
            least = least_tokens(size)
            layout = SequenceLayout(num_places=size, counts=self.counts, least=least)
            self.plan = PromptPlan(layout, None, "latents", KDAPieces(()))
            self.hidden: Tensor
            self._graph: torch.cuda.CUDAGraph | None = None
            if device.type == "cuda":
                with torch.cuda.device(device):
                    self._record(pool)
        # weights whose scales were copied, what the recording reads, and the last copy
        self._scaled = [
            (x, block_scales(x), block_scales(x))
            for x in model.parameters()
            if hasattr(x, "block_scales")
        ]

    def _run(self) -> None:
        x = self.backbone.embed_tokens(self.ids)
        # what an earlier text has left behind this one might be NaN, which would spread
        self.plan.layout.fill_behind(x, 0)
        for layer in self.backbone.layers:
            x = layer(x, plan=self.plan)
        self.hidden = self.backbone.norm(x)

    def _record(self, pool: Any) -> None:
        """Run once, so that all kernels are compiled and chosen; then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # left as it was found, if the recording fails
                self._graph = self._captured(pool)
        finally:
            torch.cuda.current_stream().wait_stream(stream)

    def _captured(self, pool: Any) -> torch.cuda.CUDAGraph:
        self._run()
        self.plan.states.clear()
        self.plan.latents.clear()
        torch.cuda.synchronize()
        gc.collect()  # what is collected later must not be freed meanwhile
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate and wait meanwhile, which by default ends the recording
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self._run()
        finally:
            graph.capture_end()
        return graph

    def read(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Read a text [1, T] into an empty cache: the hidden states [1, T, D], in memory that the
        next one overwrites."""
        num_tokens = input_ids.shape[1]
        for i, (each, own, last) in enumerate(self._scaled):
            now = block_scales(each)
            if now is not last:  # its scales were written to
                self._scaled[i] = each, own.copy_(now), now
        self.ids[:, :num_tokens] = input_ids
        self.counts.fill_(num_tokens)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        cache.begin_call()
        for i, state in self.plan.states.items():
            cache.layers[i].hold(state.map(Tensor.clone), num_tokens)
        for i, latent in self.plan.latents.items():
            cache.layers[i].update(latent[:, :num_tokens])
        cache.end_call(self.backbone.layers)
        return self.hidden[:, :num_tokens]


class RecordedPrompts:
    """Those of one model. Whoever calls it holds a lock."""

    def __init__(self) -> None:
        # by P, one of 34 numbers; None where one text came
        self._prompts: dict[int, RecordedPrompt | None] = {}
        self._has_failed = False  # and is not tried again, until the model changes
        self._pool: Any = None
        self._stream: Any = None  # of the last one

    def clear(self) -> None:
        """Forget all."""
        self._prompts.clear()
        self._has_failed, self._pool = False, None

    def read(self, model: Any, input_ids: Tensor, cache: Any) -> Tensor | None:
        """See `RecordedPrompt.read`; None if the layers are to read this text."""
        size, device = recorded_tokens(input_ids.shape[1]), input_ids.device
        if size not in self._prompts:  # the first text of this size
            self._prompts[size] = None
            return None
        prompt = self._prompts[size] or self._recorded(model, size)
        if prompt is None:
            return None
        if device.type != "cuda":
            return prompt.read(input_ids, cache)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)  # which may still use the same buffers
            self._stream = stream
            return prompt.read(input_ids, cache)

    def _recorded(self, model: Any, size: int) -> RecordedPrompt | None:
        """A new one. None where one would not do; and until the model changes if making one fails:
        the layers can read the text."""
        if self._has_failed or not _has_memory(model.device) or _waits(model):
            return None
        if self._pool is None and model.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._prompts[size] = prompt = RecordedPrompt(model, size, self._pool)
            return prompt
        except (RuntimeError, TritonError) as error:
            logger.warning_once(
                f"prompts are read layer by layer, not by a recorded graph: {error}"
            )
            self._has_failed = True
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # not before the error's frames are gone
        return None


def _waits(model: Any) -> bool:
    """Whether experts make the host wait for the device, as all forms but those of `ops/experts/
    prefill.py` may do."""
    if model.device.type != "cuda":
        return False
    if experts_backend(model.config) != "grouped_mm":
        return True
    x = model.model.embed_tokens.weight.new_empty(1, model.config.hidden_size)
    layers = [layer for layer in model.model.layers if layer.is_moe]
    return not all(can_prefill(layer.block_sparse_moe.experts, x) for layer in layers)


def _has_memory(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    return free >= FREE_SHARE * total
