"""A decode step recorded as a CUDA graph, and its inputs.

Shapes: B rows of the cache, T new tokens of each, S tokens of cache and call.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kimi_linear.decode.addresses import (
    AddressTable,
    Counters,
    KDAAddresses,
    LatentAddresses,
    PoolTable,
    padded,
)
from kimi_linear.decode.divided import divided_step
from kimi_linear.decode.few_rows import FewRowsStep
from kimi_linear.decode.many_rows import ManyRowsStep
from kimi_linear.decode.packed import PackedManyRowsStep
from kimi_linear.decode.packed_few_rows import PackedFewRowsStep
from kimi_linear.decode.step import DecodeStep
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.quantized import has_quantized

PLAIN_KINDS = (FewRowsStep, ManyRowsStep)
PACKED_KINDS = (PackedFewRowsStep, PackedManyRowsStep)


class StepKind(NamedTuple):
    """What tells the steps of one model apart, see `DecodeStep`."""

    num_sequences: int
    has_padding: bool = False
    num_tokens: int = 1
    is_pending: bool = False
    page_tokens: int = 0


def decode_step(model: nn.Module, kind: StepKind, group: Any = None) -> DecodeStep:
    """The step of this kind; with a group, of a model that is one process' part of its model."""
    few, many = PACKED_KINDS if has_quantized(model, PackedWeights) else PLAIN_KINDS
    is_few = kind.num_sequences * kind.num_tokens <= few.most_rows
    if group is not None:
        return divided_step(is_few, group, model, *kind)
    return (few if is_few else many)(model, *kind)


class Recording:
    """A `DecodeStep` and its CUDA graph; on other devices it is launched each time.

    Args:
        model: All of a model, or a process' part of it.
        kind: Of the step.
        group: The processes, if it is a part.

    Attributes:
        step: What is recorded.
    """

    def __init__(self, model: nn.Module, kind: StepKind, group: Any = None) -> None:
        self._table: AddressTable | PoolTable | None = None
        self._counts: Counters | None = None  # that the device has
        self._stream: torch.cuda.Stream | None = None  # of the last run
        # made in inference mode, buffers could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            self.step = decode_step(model, kind, group)
            if self.step.device.type == "cuda":
                with torch.cuda.device(self.step.device):
                    self._record()

    def _record(self) -> None:
        """Run once, on scratch memory, so that all kernels are compiled; then record."""
        step = self.step
        scratch: list[Tensor] = []
        self._load_rows(_scratch_rows(step, scratch))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # other threads may allocate and wait meanwhile, which by default ends the recording
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            step.run()

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        table: AddressTable | PoolTable,
        counts: Counters | Tensor,
    ) -> Tensor:
        """Logits [B, T, vocab_size] behind a cache with these counts, the same of all rows; or
        [B, 4], those of each row of the step."""
        step = self.step
        if step.device.type != "cuda":
            self._load(input_ids, attention_mask, table, counts)
            step.run()
            return self._logits()
        with torch.cuda.device(step.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)  # which may still use the same buffers
            self._stream = stream
            self._load(input_ids, attention_mask, table, counts)
            self._graph.replay()
            return self._logits()

    def _logits(self) -> Tensor:
        return self.step.logits.unflatten(0, self.step.ids.shape).clone()

    def _load(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        table: AddressTable | PoolTable,
        counts: Counters | Tensor,
    ) -> None:
        """Put a step's inputs where the kernels look for them."""
        step = self.step
        if table is not self._table:
            self._load_rows(table.rows)
            self._table = table
        if isinstance(counts, Tensor):
            step.counters.copy_(counts, non_blocking=True)
        else:
            self._load_counts(counts)
        if attention_mask is not None:
            self._load_mask(attention_mask)
        step.ids.copy_(input_ids)

    def _load_counts(self, counts: Counters) -> None:
        """Put what all rows have in common where it is not there yet."""
        step = self.step
        for place, count in enumerate(counts[:-1]):
            if self._counts is None or self._counts[place] != count:
                step.counters[:, place].fill_(count)
        cached, logged, pending, _ = counts  # as the step itself counts
        self._counts = Counters(cached + step.num_tokens, logged + step.num_tokens, pending)

    def _load_rows(self, rows: list[list[int]]) -> None:
        self.step.table.copy_(torch.tensor(rows, dtype=torch.int64))

    def _load_mask(self, attention_mask: Tensor) -> None:
        """Copy the mask [B, S] to where the kernels look for it."""
        step, tokens = self.step, attention_mask.shape[1]
        if step.real_tokens.shape[1] < tokens:
            with torch.inference_mode(False):
                step.reserve_mask(2 * tokens)
        step.real_tokens[:, :tokens] = attention_mask != 0


def _scratch_rows(step: DecodeStep, kept: list[Tensor]) -> list[list[int]]:
    """Addresses of memory to write to while a step is tried out, one for all layers of a kind;
    `kept` holds it."""
    config, B, T = step.config, step.num_sequences, step.num_tokens
    linear = config.linear_attn_config
    H, K, W = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    R = config.kv_lora_rank + config.qk_rope_head_dim

    def address(*shape: int, dtype: torch.dtype = step.dtype) -> int:
        kept.append(torch.zeros(*shape, dtype=dtype, device=step.device))
        return kept[-1].data_ptr()

    conv, state = address(B, 3, H * K, W - 1), address(B, H, K, K, dtype=torch.float32)
    kda: Any = KDAAddresses(conv, state)
    latent: Any = LatentAddresses(tail=address(B, T, R), tail_stride=T * R)
    if step.page_tokens:
        page = address(1, dtype=torch.int32)
        latent = LatentAddresses(tail=address(1, step.page_tokens, R), pages=page)
    return padded([kda if is_kda else latent for is_kda in step.is_kda])
