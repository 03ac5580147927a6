"""Many requests at once: which texts are read, which go on, and what each is told.

A prompt is read into a cache of its own, or several beside each other; then its text moves to where
it decodes, a row and pages of a `TextPool` on a GPU, that cache itself elsewhere. Between two steps
of all texts that decode, at most `max_batch_tokens` tokens of prompts are read. When pages run out,
the text that came last gives its own back and is read again later.

Transformers' manager (`upstream/requests.py`) calls `prepare_next_batch`, `_generation_step` and
`update_batch` in turn, from a thread of its own.
"""

import math
import time
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from kimi_linear.cache.hybrid import KimiLinearCache
from kimi_linear.cache.pool import TextPool
from kimi_linear.decode.few_rows import power_below
from kimi_linear.decode.graph import decode_pool, pool_obstacle
from kimi_linear.decode.obstacles import MAX_PAIRS, MAX_ROWS
from kimi_linear.upstream.requests import RequestStatus, drained

logger = logging.get_logger(__name__)

# Tokens of prompts read between two steps, unless `max_batch_tokens` says another number.
READ_TOKENS = 8192
# Reading few tokens takes as long as reading so many: prompts wait for others so long, counted from
# the last reading.
WORTHWHILE_TOKENS, PATIENCE_SECONDS = 2048, 0.2
# Prompts beside each other, at most: each has states of its own while it is read.
READ_ROWS = 16
# Of the free memory of a GPU, for states and latents.
MEMORY_SHARE = 0.8


class OwnCaches:
    """Texts that decode one by one, each with its cache.

    Args:
        model: A `KimiLinearForCausalLM`.
        num_rows: Texts at a time.
    """

    group = 1  # prompts that may be read beside each other

    def __init__(self, model: Any, num_rows: int) -> None:
        self.model, self.num_rows = model, num_rows
        self.caches: dict[int, Any] = {}

    @property
    def num_free_rows(self) -> int:
        """Texts that can still come."""
        return self.num_rows - len(self.caches)

    def most_tokens(self) -> float:
        """The longest text that can be held."""
        return math.inf

    def has_room(self, lengths: list[int]) -> bool:
        """Whether texts of these lengths can be held now, beside those that are."""
        return len(lengths) <= self.num_free_rows

    def add(self, cache: Any, row: int, num_padding: int) -> int:
        """Take over a row of a cache, whose first columns are padding; its row here."""
        assert row == num_padding == 0
        own = min(set(range(self.num_rows)) - set(self.caches))
        self.caches[own] = cache
        return own

    def fork(self, row: int) -> int:
        """Another text that goes on from here."""
        return self.add(self.caches[row].fork(), 0, 0)

    def free(self, row: int) -> None:
        """Forget a text."""
        del self.caches[row]

    def grow(self, row: int) -> bool:
        """Make room for one more token; False if there is none."""
        return True

    def step(self, rows: list[int], ids: Tensor) -> Tensor:
        """Logits [texts, vocab_size] of one more token of each text, ids [texts]."""
        one_by_one = zip(rows, ids, strict=True)
        return torch.cat(
            [
                self.model(x.view(1, 1), cache=self.caches[row]).logits[:, -1]
                for row, x in one_by_one
            ]
        )


class PooledTexts:
    """Texts of a pool, which decode together by recorded steps; as `OwnCaches`.

    Args:
        model: A `KimiLinearForCausalLM` that `pool_obstacle` has nothing against.
        num_rows: Texts at a time, at most.
        num_pages: Of all texts together; None: as many as memory has room for.
        page_tokens: Tokens of a page.
        memory_share: Of the free memory, for rows and pages.
    """

    group = READ_ROWS

    def __init__(
        self,
        model: Any,
        num_rows: int,
        num_pages: int | None,
        page_tokens: int,
        memory_share: float,
    ) -> None:
        self.model = model
        if num_pages is None:
            row, page = TextPool.bytes_of(model.config, page_tokens, model.dtype)
            free = memory_share * torch.cuda.mem_get_info(model.device)[0]
            # states take at most half of it
            num_rows = max(1, min(num_rows, int(free / 2 // row) - 1))
            num_pages = max(1, int((free - (num_rows + 1) * row) // page) - 1)
        place: Any = {"dtype": model.dtype, "device": model.device, "page_tokens": page_tokens}
        self.pool = TextPool(model.config, num_rows, num_pages, **place)

    @property
    def num_free_rows(self) -> int:
        return self.pool.num_free_rows

    def most_tokens(self) -> float:
        return self.pool.num_pages * self.pool.page_tokens

    def has_room(self, lengths: list[int]) -> bool:
        pages = sum(map(self.pool.pages_for, lengths))
        return len(lengths) <= self.num_free_rows and pages <= self.pool.num_free_pages

    def add(self, cache: Any, row: int, num_padding: int) -> int:
        return self.pool.add(cache, row, num_padding=num_padding)

    def fork(self, row: int) -> int:
        return self.pool.fork(row)

    def free(self, row: int) -> None:
        self.pool.free(row)

    def grow(self, row: int) -> bool:
        return self.pool.grow(row, 1)

    def step(self, rows: list[int], ids: Tensor) -> Tensor:
        return decode_pool(self.model, self.pool, rows, ids)


class Reading:
    """Prompts that are read beside each other, piece by piece, left-padded.

    Args:
        model: Reads them.
        states: Of the requests.
        most_tokens: Of a piece, all rows together.

    Attributes:
        logits: [rows, vocab_size] of the last tokens, once all is read.
    """

    def __init__(self, model: Any, states: list[Any], most_tokens: int) -> None:
        self.model, self.states = model, states
        texts = [torch.tensor(state.initial_tokens) for state in states]
        longest = max(map(len, texts))
        self.padding = [longest - len(text) for text in texts]
        rows = zip(self.padding, texts, strict=True)
        self.ids = torch.stack([F.pad(text, (n, 0)) for n, text in rows]).to(model.device)
        columns = torch.arange(longest, device=model.device)
        padding = torch.tensor(self.padding, device=model.device)
        self.mask = (columns >= padding[:, None]).long() if any(self.padding) else None
        # equal pieces: a short one at the end would be a step of its own kind
        count = -(-self.ids.numel() // most_tokens)
        self.size, self.done = -(-longest // count), 0
        self.cache = KimiLinearCache(model.config, rollback_tokens=0, reserve_tokens=longest)

        self.logits: Tensor | None = None

    def lengths(self) -> list[int]:
        """Of the texts that will go on from here, with their first new tokens."""
        counts = ((len(state.initial_tokens) + 1, 1 + state.num_children) for state in self.states)
        return [length for length, count in counts for _ in range(count)]

    def read(self) -> None:
        """Read a piece."""
        stop = self.done + self.size
        mask = None if self.mask is None else self.mask[:, :stop]
        piece = self.ids[:, self.done : stop]
        out = self.model(piece, attention_mask=mask, cache=self.cache, logits_to_keep=1)
        self.done = min(stop, self.ids.shape[1])
        if self.done == self.ids.shape[1]:
            self.logits = out.logits[:, -1]


class RequestProcessor:
    """Runs the requests of one manager.

    Args:
        model: A `KimiLinearForCausalLM`.
        manager: A `RequestManager`.

    Raises:
        ValueError: If the model is divided among processes.
    """

    # what the manager looks at
    use_async_batching = False
    inputs_and_outputs = None

    def __init__(self, model: Any, manager: Any) -> None:
        if getattr(model, "_device_mesh", None) is not None:
            raise ValueError(
                "generate_batch() and continuous batching are not supported for a model that "
                "several processes share (tp_size, ep_size): each process must have all of it"
            )
        settings = manager.continuous_batching_config
        self.model, self.manager = model, manager
        self.processors, self.outputs = manager.logit_processor, manager.output_router
        self.read_tokens = settings.max_batch_tokens or READ_TOKENS
        self.returns_logprobs = settings.return_logprobs
        self.samples = manager.generation_config.do_sample
        self.generator = None
        if settings.seed is not None:
            self.generator = torch.Generator(model.device).manual_seed(settings.seed)
        num_rows = min(settings.max_requests_per_batch or MAX_ROWS, most_rows(model.config))
        reason = pool_obstacle(model, num_rows)
        share = settings.max_memory_percent or MEMORY_SHARE
        self.texts = (
            OwnCaches(model, num_rows)
            if reason
            else PooledTexts(model, num_rows, settings.num_blocks, settings.page_size, share)
        )
        if reason and model.device.type == "cuda":
            logger.warning_once(f"requests decode one by one, layer by layer: {reason}")
        # by row, in the order in which they came
        self.active: OrderedDict[int, Any] = OrderedDict()
        self._last_read = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget all requests."""
        self.waiting: deque[Any] = deque()
        self.reading: Reading | None = None
        for row in list(self.active):
            self._end(row)
        self._results: list[Any] = []

    # --------------------------------------------------------------------- what the manager calls
    def prepare_next_batch(self) -> bool:
        """Take in what was asked for since the last step; whether there is something to do."""
        status = self.manager.background_thread_status
        status.update_with_tp_status(status.local_status)
        if status.tp_status == status.HARD_STOP:
            return False
        if getattr(status, "is_pause_requested", bool)():  # 5.17 has none
            status.pause_and_wait()
        for state in drained(self.manager.input_queue):
            try:
                self.processors.check_kwargs(state.logit_processor_kwargs)
                self._check(state)
            except Exception as error:  # any kind: it is this request's alone
                self._handle_request_error(error, state)
            else:
                self.waiting.append(state)
        for request_id in drained(self.manager.cancel_queue):
            self._cancel(request_id)
        return self.has_pending_requests()

    @torch.no_grad()
    def _generation_step(self, model: Any) -> None:
        self._read()
        if self.active:
            self._decode()

    def update_batch(self) -> None:
        """Hand out what the last step has found."""
        results, self._results = self._results, []
        if results:
            self.outputs.deliver_batch(results)

    def has_pending_requests(self) -> bool:
        """Whether some request has not ended."""
        return bool(self.waiting or self.active or self.reading)

    def fail_all_requests(self, error: Exception) -> None:
        """End all requests with an error."""
        states = [*self.active.values(), *self.waiting]
        states += [] if self.reading is None else self.reading.states
        for row in list(self.active):
            self._end(row)
        self.waiting.clear()
        self.reading = None
        for state in states:
            self._handle_request_error(error, state)

    def _handle_request_error(self, error: Exception, state: Any) -> None:
        self.outputs.fail_and_deliver(state, error)

    def warmup(self, model: Any) -> None:
        """Nothing: steps are recorded when they first run."""

    # ------------------------------------------------------------------------------------ prompts
    def _check(self, state: Any) -> None:
        """ValueError for a request that can never be answered."""
        count, limit = len(state.initial_tokens), self.model.config.max_prompt_tokens
        if not count:
            raise ValueError("input_ids has no token, which is not allowed: it must have one")
        if limit is not None and count > limit:
            raise ValueError(
                f"input_ids has {count} tokens, which is not allowed: it must have at most "
                f"max_prompt_tokens={limit}, a field of config.json"
            )
        if count >= self.texts.most_tokens():
            raise ValueError(
                f"input_ids has {count} tokens, which is not allowed: all memory of requests has "
                f"room for {self.texts.most_tokens()} with the answer"
            )

    def _read(self) -> None:
        """Read a piece of the prompts that are next; those that are read wait for their memory,
        which texts that go on may have taken meanwhile."""
        if self.reading is None:
            states = self._next_prompts()
            if not states:
                return
            for state in states:
                self.waiting.remove(state)
                state.status = RequestStatus.PREFILLING
            self.reading = Reading(self.model, states, self.read_tokens)
        reading = self.reading
        if reading.logits is None:
            try:
                reading.read()
            except Exception as error:  # any kind: others go on
                self.reading = None
                for state in reading.states:
                    self._handle_request_error(error, state)
                return
        if reading.logits is not None and self.texts.has_room(reading.lengths()):
            self.reading, self._last_read = None, time.perf_counter()
            self._admit(reading, reading.logits)

    def _next_prompts(self) -> list[Any]:
        """The first requests that wait, as many as are worth reading beside each other."""
        chosen: list[Any] = []
        lengths: list[int] = []
        for state in self.waiting:
            own = [len(state.initial_tokens) + 1] * (1 + state.num_children)
            longest, rows = max([*lengths, *own]), len(chosen) + 1
            is_wasteful = 2 * longest * rows > 3 * (sum(map(_length, chosen)) + own[0])
            if chosen and (longest * rows > self.read_tokens or is_wasteful):
                break
            if rows > self.texts.group or not self.texts.has_room([*lengths, *own]):
                break
            chosen.append(state)
            lengths += own
        is_short = sum(map(_length, chosen)) < WORTHWHILE_TOKENS
        if chosen and self.active and is_short and self.texts.group > 1:
            since = max(chosen[0].created_time, self._last_read)
            if time.perf_counter() - since < PATIENCE_SECONDS:
                return []
        return chosen

    def _admit(self, reading: Reading, logits: Tensor) -> None:
        """Let texts that have been read go on, each with its first token."""
        rows: list[int] = []
        sources: list[int] = []
        for i, state in enumerate(reading.states):
            if state.status == RequestStatus.FINISHED:  # cancelled meanwhile
                continue
            row = self.texts.add(reading.cache, i, reading.padding[i])
            children = [
                state.fork(f"{state.request_id}__child#{n}") for n in range(state.num_children)
            ]
            state.num_children = 0
            own = [row, *(self.texts.fork(row) for _ in children)]
            for each, child in zip(own, [state, *children], strict=True):
                child.num_children, child.status = 0, RequestStatus.DECODING
                self.active[each] = child
            rows += own
            sources += [i] * len(own)
        if rows:
            self._take(rows, logits[sources])

    # ------------------------------------------------------------------------------------- answers
    def _decode(self) -> None:
        """One more token of each text."""
        for row in list(self.active):
            while row in self.active and not self.texts.grow(row):
                self._set_back(next(reversed(self.active)))
        rows = list(self.active)
        if not rows:
            return
        last = [self.active[row].generated_tokens[-1] for row in rows]
        ids = torch.tensor(last, device=self.model.device)
        self._take(rows, self.texts.step(rows, ids))

    def _set_back(self, row: int) -> None:
        """Take a text's memory away. It is read again when there is room, or ended if it is alone:
        nothing else can give room to it."""
        state = self.active[row]
        is_alone = len(self.active) == 1
        self._end(row)
        if is_alone:
            count = len(state.initial_tokens) + len(state.generated_tokens)
            text = f"the text has {count} tokens, for more there is no memory"
            self._handle_request_error(RuntimeError(text), state)
        else:
            self.waiting.appendleft(state.create_equivalent_initial_request())

    def _take(self, rows: list[int], logits: Tensor) -> None:
        """Choose a token for each text from its logits [texts, vocab_size], and tell."""
        states = [self.active[row] for row in rows]
        tokens, logprobs = self._choose(states, logits.float())
        for i, (row, state) in enumerate(zip(rows, states, strict=True)):
            logprob = None if logprobs is None else logprobs[i]
            if state.update_and_check_completion(tokens[i], logprob):
                self._end(row)
            if state.streaming or state.status == RequestStatus.FINISHED:
                self._results.append(state.to_generation_output())

    def _choose(self, states: list[Any], scores: Tensor) -> tuple[list[int], list[float] | None]:
        """Tokens and their log probabilities, on the host."""
        if self.processors.do_processing:
            count = self.processors.tensors_required
            args = torch.zeros(count, len(states), dtype=torch.int32, device=scores.device)
            wrapped = [SimpleNamespace(state=state, has_new_token=True) for state in states]
            self.processors.prepare_tensor_args(wrapped, args)
            scores = self.processors(None, scores, args)
        if self.samples:
            chances = scores.softmax(dim=-1)
            chosen = torch.multinomial(chances, 1, generator=self.generator)[:, 0]
        else:
            chosen = scores.argmax(dim=-1)
        if not self.returns_logprobs:
            return chosen.tolist(), None
        found = scores.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
        return chosen.tolist(), found.tolist()

    def _end(self, row: int) -> None:
        """Forget a text."""
        del self.active[row]
        self.texts.free(row)

    def _cancel(self, request_id: str) -> None:
        """End a request, of which nothing more is told."""
        for row, state in list(self.active.items()):
            if state.request_id == request_id:
                self._end(row)
        self.waiting = deque(x for x in self.waiting if x.request_id != request_id)
        for state in [] if self.reading is None else self.reading.states:
            if state.request_id == request_id:
                state.status = RequestStatus.FINISHED


def _length(state: Any) -> int:
    return len(state.initial_tokens)


def most_rows(config: Any) -> int:
    """Rows of a recorded step, at most, as a power of two."""
    return min(MAX_ROWS, power_below(MAX_PAIRS // (config.num_experts_per_token or 1)))
