"""Many requests at once: which texts are read, which go on, and what each is told.

A prompt is read into a cache of its own, several prompts in one call; then its text moves to where
it decodes, a row and pages of a `TextPool` on a GPU, that cache itself elsewhere. Between two steps
of all texts that decode, at most `max_batch_tokens` tokens of prompts are read. When pages run out,
the text that came last gives its own back and is read again later.

The device chooses tokens and goes on with them; the host looks at each step's tokens while the next
step runs. A text whose end it sees so has had steps too many, which nobody is told of. To launch a
reading may take the host longer than it takes the device, so steps are queued before it. With
drafts (`prompt_lookup_num_tokens`) the host looks first: the next step goes on from what was right;
so it does on a CPU, where nothing would run meanwhile.

Transformers' manager (`upstream/requests.py`) calls `prepare_next_batch`, `_generation_step` and
`update_batch` in turn, from a thread of its own.
"""

import itertools
import time
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.utils import logging

from kimi_linear.cache.pending import STEP_TOKENS
from kimi_linear.decode.few_rows import power_below
from kimi_linear.decode.graph import pool_obstacle
from kimi_linear.decode.obstacles import MAX_PAIRS, MAX_ROWS
from kimi_linear.generation.chosen import Chosen
from kimi_linear.generation.drafts import GroupDrafts
from kimi_linear.generation.lookup import num_right
from kimi_linear.generation.reading import Prefix, Reading, first_lengths, prompt_length
from kimi_linear.generation.texts import OwnCaches, PooledTexts
from kimi_linear.parallel.own_part import has_divided_parameters
from kimi_linear.upstream.late_stop import LATE_DEVICE_TYPES
from kimi_linear.upstream.models import is_divided
from kimi_linear.upstream.requests import PAGE_SIZE, RequestStatus, drained

logger = logging.get_logger(__name__)

# Tokens of prompts read between two steps, unless `max_batch_tokens` says another number.
READ_TOKENS = 8192
# Where memory has no room for that, they are halved down to so many.
LEAST_READ_TOKENS = 256
# Reading few tokens takes nearly as long as reading so many: prompts wait for others so long,
# counted from the last reading; if there are more prompts than rows, so that all wait anyway, the
# longer time.
WORTHWHILE_TOKENS, PATIENCE_SECONDS, QUEUE_PATIENCE_SECONDS = 4096, 0.1, 0.4
# Texts that may get longer answers begin earlier, so that the last ones end together: a request
# counts as having come so much earlier for each token of its answer, at most so long.
TURN_SECONDS, MAX_TURN_SECONDS = 0.004, 2.0
# A beginning that prompts share is read once, from so many tokens on; it is looked for among the
# next requests, this many.
PREFIX_TOKENS, PREFIX_REQUESTS = 256, 32
# Prompts of one call, at most: each has states of its own while it is read.
READ_TEXTS = 32
# Tokens of texts that are read before the first request: alone, of one length and of several; a
# short one and a long one.
WARM_UP_TEXTS = (40,), (65, 65), (65, 130), (2200,)
WARM_UP_DEVICES = ("cuda",)
# Models that have read them: what they compiled serves the next managers too.
_warm_models: WeakSet[Any] = WeakSet()
# Of the free memory of a GPU, for states and latents.
MEMORY_SHARE = 0.8


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
        if is_divided(model) or has_divided_parameters(model):
            raise ValueError(
                "generate_batch() and continuous batching are not supported for a model that "
                "several processes share (tp_size, ep_size, FSDP): each process must have all of it"
            )
        settings = manager.continuous_batching_config
        self.model, self.manager = model, manager
        self.processors, self.outputs = manager.logit_processor, manager.output_router
        self.read_tokens = settings.max_batch_tokens or READ_TOKENS
        self.read_texts = READ_TEXTS
        self.returns_logprobs = settings.return_logprobs
        self.samples = manager.generation_config.do_sample
        self.generator = None
        if settings.seed is not None:
            self.generator = torch.Generator(model.device).manual_seed(settings.seed)
        self.settings = settings
        found = manager.generation_config.prompt_lookup_num_tokens or 0
        self.most_drafted = min(found, STEP_TOKENS - 1)
        self.match_size = manager.generation_config.max_matching_ngram_size or 2
        self.drafts: GroupDrafts | None = None
        self.texts: Any = None
        # by row, in the order in which they came
        self.active: OrderedDict[int, Any] = OrderedDict()
        # what the host has not seen; by row, a text's last token, on the device
        self.chosen: list[Chosen] = []
        self.last: Tensor
        self.prefix: Prefix | None = None
        self.shares_prefixes = settings.allow_block_sharing
        self._last_read = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget all requests, and look at the model anew: it may be another since the last."""
        self.waiting: deque[Any] = deque()
        self.reading: Reading | None = None
        self._read_alone: set[str] = set()  # requests, after an error while several were read
        self._end_all()
        self._drop_prefix()
        self._results: list[Any] = []
        self._find_place()

    def _find_place(self) -> None:
        """Where texts of the model, as it is now, decode; none is there yet."""
        settings, model = self.settings, self.model
        num_rows = min(settings.max_requests_per_batch or MAX_ROWS, most_rows(model.config))
        if reason := pool_obstacle(model, num_rows):
            if model.device.type == "cuda":
                logger.warning_once(f"requests decode layer by layer, not as one graph: {reason}")
            self.texts, self.drafts = OwnCaches(model, num_rows), None
        elif getattr(self.texts, "made_for", None) != (model.dtype, model.device):
            share = settings.max_memory_percent or MEMORY_SHARE
            pages = settings.num_blocks, getattr(settings, PAGE_SIZE)
            self.texts = None  # its memory is for the next
            rollback_tokens = self.most_drafted and 1 + self.most_drafted
            self.texts = PooledTexts(model, num_rows, *pages, share, rollback_tokens)
        if self.most_drafted and isinstance(self.texts, PooledTexts):
            most = most_rows(model.config)
            self.drafts = GroupDrafts(self.most_drafted, self.match_size, most)
        with torch.inference_mode(False):  # written to outside of it
            rows = self.texts.num_rows + 1  # and a prefix's
            self.last = torch.zeros(rows, dtype=torch.int64, device=model.device)

    # --------------------------------------------------------------------- what the manager calls
    def prepare_next_batch(self) -> bool:
        """Take in what was asked for since the last step; whether there is something to do."""
        status = self.manager.background_thread_status
        status.update_with_tp_status(status.local_status)
        if status.tp_status == status.HARD_STOP:
            self._look(self.chosen)  # some are answered
            return False
        if getattr(status, "is_pause_requested", bool)():  # 5.17 has none
            self._look(self.chosen)
            self.update_batch()
            self._forget_prefix()
            status.pause_and_wait()
        arrived = []
        for state in drained(self.manager.input_queue):
            try:
                self.processors.check_kwargs(state.logit_processor_kwargs)
                self._check(state)
            except Exception as error:  # any kind: it is this request's alone
                self._handle_request_error(error, state)
            else:
                arrived.append(state)
        if arrived:
            self.waiting = deque(sorted([*self.waiting, *arrived], key=_turn))
        for request_id in drained(self.manager.cancel_queue):
            self._cancel(request_id)
        is_needed = self.has_pending_requests()
        if not is_needed:
            self._forget_prefix()
        return is_needed

    @torch.no_grad()
    def _generation_step(self, model: Any) -> None:
        has_read = self._read()
        self._decode(is_timed=not has_read)

    def update_batch(self) -> None:
        """Hand out what the last step has found."""
        results, self._results = self._results, []
        if not self.has_pending_requests():  # before the last one is told of
            self._forget_prefix()
        if results:
            self.outputs.deliver_batch(results)

    def has_pending_requests(self) -> bool:
        """Whether some request has not ended."""
        return bool(self.waiting or self.active or self.reading)

    def fail_all_requests(self, error: Exception) -> None:
        """End all requests with an error, but for those that the last step has ended."""
        with suppress(RuntimeError):  # of the device, if it is that which has failed
            self._look(self.chosen)
        self.update_batch()
        states = [*self.active.values(), *self.waiting]
        self._end_all()
        if self.reading is not None:  # some of its requests may be among those that go on
            states += [x for x in self.reading.states if x.status == RequestStatus.PREFILLING]
        self.waiting.clear()
        self.reading = None
        for state in states:
            self._handle_request_error(error, state)

    def _handle_request_error(self, error: Exception, state: Any) -> None:
        self.outputs.fail_and_deliver(state, error)

    @torch.no_grad()
    def warmup(self, model: Any) -> None:
        """Record the steps of one token of all numbers of rows, and compile most of what reads
        prompts. Steps with drafts, and those of a model that has changed, are recorded when they
        first run."""
        try:
            self.texts.warm_up()
            if model.device.type in WARM_UP_DEVICES and model not in _warm_models:
                for lengths in WARM_UP_TEXTS:
                    Reading(model, [[0] * count for count in lengths], self.read_tokens).read()
                _warm_models.add(model)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            logger.warning(f"there is no memory to warm up all that requests may need: {error}")

    # ------------------------------------------------------------------------------------ prompts
    def _check(self, state: Any) -> None:
        """ValueError for a request that can never be answered."""
        count, limit = len(state.initial_tokens), self.model.config.max_prompt_tokens
        if not count:
            raise ValueError("input_ids has no token, which is not allowed: it must have one")
        size, largest = self.model.config.vocab_size, max(state.initial_tokens)
        if min(state.initial_tokens) < 0 or largest >= size:
            raise ValueError(
                f"input_ids has {min(state.initial_tokens)} to {largest}, which is not allowed: "
                f"they must be from 0 to {size - 1} (vocab_size={size})"
            )
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
        rows = 1 + state.num_children
        if rows > self.texts.num_rows or not self.texts.can_hold(first_lengths(state)):
            raise ValueError(
                f"num_return_sequences={rows} is not allowed: {self.texts.num_rows} texts go on at "
                f"a time (max_requests_per_batch), with {self.texts.most_tokens()} tokens in all"
            )

    def _read(self) -> bool:
        """Read a piece of the prompts that are next; those that are read wait for their memory,
        which texts that go on may have taken meanwhile. Whether there was something to read."""
        if self.reading is None:
            self.reading = self._next_reading()
            if self.reading is not None and self.looks_late:
                for _ in range(self.texts.steps_ahead):
                    self._step(is_timed=False)
        reading = self.reading
        if reading is None:
            return False
        if not reading.is_done:
            try:
                reading.read()
            except torch.OutOfMemoryError as error:
                self._read_less(reading, error)
                return True
            except Exception as error:  # any kind: others go on
                self._fail_reading(error)
                return True
        if reading.is_done and self._has_room(reading.lengths(), may_drop=True):
            if reading.states:
                self._admit(reading)
            else:
                (cache,) = reading.caches
                self.prefix = Prefix(reading.texts[0], cache, self.texts.add(cache.fork()))
            self.reading, self._last_read = None, time.perf_counter()
        return True

    def _read_less(self, reading: Reading, error: Exception) -> None:
        """From now on read fewer prompts at once, and then smaller pieces: what is left beside
        weights, states and latents has no room for so many."""
        if len(reading.states) > 1:
            self.read_texts = len(reading.states) // 2
            self._wait_again(reading)
        elif reading.piece_tokens > LEAST_READ_TOKENS:
            self.read_tokens = max(LEAST_READ_TOKENS, reading.piece_tokens // 2)
            self.reading = reading.again(self.read_tokens)
        else:
            self._fail_reading(error)

    def _fail_reading(self, error: Exception) -> None:
        """End the request whose prompt cannot be read. Of several, each is read again by itself;
        of a prefix, do without."""
        reading, self.reading = self.reading, None
        assert reading is not None
        self.shares_prefixes &= bool(reading.states)
        if len(reading.states) > 1:
            self._read_alone |= {state.request_id for state in reading.states}
            self._wait_again(reading)
        else:
            for state in reading.states:
                self._handle_request_error(error, state)

    def _wait_again(self, reading: Reading) -> None:
        """Put the requests that are read back, but for those that were cancelled meanwhile."""
        self.reading = None
        states = [x for x in reading.states if x.status != RequestStatus.FINISHED]
        self.waiting.extendleft(reversed(states))

    @property
    def _num_free_rows(self) -> int:
        return self.texts.num_rows - len(self.active)

    def _has_room(self, lengths: list[int], *, may_drop: bool) -> bool:
        """Whether texts of these lengths may go on now. Where nothing but a prefix is in their way,
        it may be given up."""
        if len(lengths) > self._num_free_rows:
            return False
        if may_drop and not self.active and not self.texts.has_room(lengths):
            self._drop_prefix()
        return self.texts.has_room(lengths)

    def _drop_prefix(self) -> None:
        if self.prefix is not None:
            self.texts.free(self.prefix.row)
            self.prefix = None

    def _forget_prefix(self) -> None:
        """Keep nothing that later requests would read: weights may change where none is there, and
        in a pause."""
        self._drop_prefix()
        if self.reading is not None and not self.reading.states:
            self.reading = None

    def _next_reading(self) -> Reading | None:
        """What to read next: prompts, or what many of them begin with."""
        states = self._next_prompts()
        if not states:
            return None
        shared = self._new_prefix(states[0])
        if shared is not None:
            self._drop_prefix()
            return Reading(self.model, [shared], self.read_tokens)
        for state in states:
            self.waiting.remove(state)
            state.status = RequestStatus.PREFILLING
        if len(states) == 1:
            self._read_alone.discard(states[0].request_id)
        prefix = self._prefix_of(states[0])
        texts = [state.initial_tokens for state in states]
        return Reading(self.model, texts, self.read_tokens, prefix, states)

    def _prefix_of(self, state: Any) -> Prefix | None:
        """The prefix that is there, if a prompt begins with it."""
        is_its = self.prefix is not None and self.prefix.begins(state.initial_tokens)
        return self.prefix if is_its else None

    def _new_prefix(self, state: Any) -> list[int] | None:
        """What a request's prompt shares with another one's that waits, if it is worth reading by
        itself and there is room for it."""
        if not self.shares_prefixes or self._prefix_of(state) is not None:
            return None
        text = state.initial_tokens
        others = itertools.islice(self.waiting, 1 + PREFIX_REQUESTS)
        shared = [_common(text, x.initial_tokens) for x in others if x is not state]
        length = min(max(shared, default=0), len(text) - 1)
        length -= length % PREFIX_TOKENS
        if not length or not self.texts.has_room([length, *first_lengths(state)]):
            return None
        return text[:length]

    def _next_prompts(self) -> list[Any]:
        """The first requests that wait, as many as are worth reading beside each other."""
        chosen: list[Any] = []
        lengths: list[int] = []
        prefix = self._prefix_of(self.waiting[0]) if self.waiting else None
        known = 0 if prefix is None else len(prefix.tokens)
        for state in self.waiting:
            own = first_lengths(state)
            num_new = sum(map(prompt_length, [*chosen, state])) - known * (1 + len(chosen))
            if chosen and (num_new > self.read_tokens or len(chosen) >= self.read_texts):
                break
            if chosen and {chosen[0].request_id, state.request_id} & self._read_alone:
                break
            if self._prefix_of(state) is not prefix or (chosen and self._new_prefix(state)):
                break
            if not self._has_room([*lengths, *own], may_drop=not chosen):
                break
            chosen.append(state)
            lengths += own
        num_new = sum(map(prompt_length, chosen)) - known * len(chosen)
        if self.active and 0 < num_new < WORTHWHILE_TOKENS:
            is_queue = len(self.waiting) > self._num_free_rows
            patience = QUEUE_PATIENCE_SECONDS if is_queue else PATIENCE_SECONDS
            since = max(chosen[0].created_time, self._last_read)
            if time.perf_counter() - since < patience:
                return []
        return chosen

    def _admit(self, reading: Reading) -> None:
        """Let texts that have been read go on, each with its first token."""
        rows: list[int] = []
        sources: list[int] = []
        # it may have been given up while they were read
        shared = reading.prefix
        like = None if shared is None or shared is not self.prefix else shared.row
        for i, state in enumerate(reading.states):
            if state.status == RequestStatus.FINISHED:  # cancelled meanwhile
                continue
            row = self.texts.add(reading.caches[i], like)
            children = [
                state.fork(f"{state.request_id}__child#{n}") for n in range(state.num_children)
            ]
            own = [row, *(self.texts.fork(row) for _ in children)]
            for each, child in zip(own, [state, *children], strict=True):
                child.num_children, child.status = 0, RequestStatus.DECODING
                self.active[each] = child
                if self.drafts is not None:
                    self.drafts.begin(each, child.initial_tokens, _ends(child))
            rows += own
            sources += [i] * len(own)
        if rows:
            self._choose(rows, [[] for _ in rows], reading.logits()[sources, None])

    # ------------------------------------------------------------------------------------- answers
    def _decode(self, *, is_timed: bool) -> None:
        """More tokens of each text; then look at those that were chosen before, or at all."""
        if not self.looks_late:  # first tokens of texts that have just been read
            self._look(self.chosen)
        is_running = self._step(is_timed=is_timed)
        self._look(self.chosen[:-1] if is_running and self.looks_late else self.chosen)

    def _step(self, *, is_timed: bool) -> bool:
        """Make room for more tokens of each text and launch the step; whether there was any."""
        for row in self._unfinished():
            while row in self.active and not self.texts.grow([row], 1):
                if self.chosen:  # texts may have ended
                    self._look(self.chosen)
                elif self.prefix is not None:
                    self._drop_prefix()
                else:
                    self._set_back(next(reversed(self.active)))
        rows = self._unfinished()
        if not rows:
            return False
        own = self._choose_drafts(rows)
        if self.drafts is not None and is_timed:
            self.drafts.start(len(rows), 1 + len(own[0]))
        logits = self.texts.step(rows, self._next_ids(rows, own))
        if logits is None:
            self._look(self.chosen)
            self._move()
            return False
        self._choose(rows, own, logits)
        return True

    @property
    def looks_late(self) -> bool:
        """Whether steps go on from what the host has not seen: not where it has nothing to do
        meanwhile, nor behind drafts."""
        return self.drafts is None and self.last.device.type in LATE_DEVICE_TYPES

    def _choose_drafts(self, rows: list[int]) -> list[list[int]]:
        """What to read behind the last token of each text, if there is room for it."""
        found = [] if self.drafts is None else self.drafts.choose(rows)
        if found and found[0] and self.texts.grow(rows, 1 + len(found[0])):
            return found
        return [[] for _ in rows]

    def _next_ids(self, rows: list[int], drafts: list[list[int]]) -> Tensor:
        """[texts, T] on the device: the last token of each text, and its draft; without waiting for
        what is being read, so that the step is launched behind it in time."""
        device = self.last.device
        ids = self.last[torch.tensor(rows).to(device, non_blocking=True)][:, None]
        if not drafts[0]:
            return ids
        return torch.cat([ids, torch.tensor(drafts).to(device, non_blocking=True)], dim=1)

    def _unfinished(self) -> list[int]:
        """Rows whose texts may have another token, counting those that the host has not seen."""
        unseen = Counter(id(state) for chosen in self.chosen for state in chosen.states)
        return [
            row
            for row, state in self.active.items()
            if state.max_new_tokens is None
            or len(state.generated_tokens) + unseen[id(state)] < state.max_new_tokens
        ]

    def _move(self) -> None:
        """Read all texts again, where the model can decode now."""
        states = [self._again(x) for x in self.active.values()]
        self._end_all()
        if self.reading is not None:
            self._wait_again(self.reading)
        self.waiting.extendleft(reversed(states))
        self._drop_prefix()
        self._find_place()

    def _again(self, state: Any) -> Any:
        """The request that reads a text, as far as it has come, and goes on."""
        again = state.create_equivalent_initial_request()
        again.created_time = state.created_time
        return again

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
            self.waiting.appendleft(self._again(state))

    def _choose(self, rows: list[int], drafts: list[list[int]], logits: Tensor) -> None:
        """Choose a token behind each that was read, by logits [texts, T, vocab_size]."""
        states, scores = [self.active[row] for row in rows], logits.flatten(0, 1).float()
        if self.processors.do_processing:
            count = self.processors.tensors_required
            args = torch.zeros(count, len(scores), dtype=torch.int32, device=scores.device)
            wrapped = [
                SimpleNamespace(state=state, has_new_token=True)
                for state in states
                for _ in range(logits.shape[1])
            ]
            self.processors.prepare_tensor_args(wrapped, args)
            scores = self.processors(None, scores, args)
        if self.samples:
            chances = scores.softmax(dim=-1)
            tokens = torch.multinomial(chances, 1, generator=self.generator)[:, 0]
        else:
            tokens = scores.argmax(dim=-1)
        logprobs = None
        if self.returns_logprobs:
            logprobs = scores.log_softmax(dim=-1).gather(1, tokens[:, None]).view(logits.shape[:2])
        tokens = tokens.view(logits.shape[:2])
        self._go_on_from(rows, tokens[:, -1])
        self.chosen.append(Chosen(rows, states, drafts, tokens, logprobs))

    def _go_on_from(self, rows: list[int], tokens: Tensor) -> None:
        """Note the last token of some texts, on the device."""
        device = self.last.device  # tokens are chosen where the head is
        place = torch.tensor(rows).to(device, non_blocking=True)
        self.last[place] = tokens.to(device, non_blocking=True)

    def _look(self, found: list[Chosen]) -> None:
        """Tell what was chosen, and end the texts that it ends."""
        self.chosen = [each for each in self.chosen if each not in found]
        last: dict[int, int] = {}  # where the device has chosen behind a draft
        for each in found:
            for row, state, draft, tokens, logprobs in each.values():
                if row not in self.active or self.active[row] is not state:
                    # cancelled, or a step too many
                    continue
                right = num_right(draft, tokens)
                self._tell(row, state, tokens[: right + 1], logprobs)
                if row not in self.active:
                    continue
                self.texts.crop(row, len(draft) - right)
                if self.drafts is not None:
                    self.drafts.texts[row].extend(tokens[: right + 1])
                if draft:
                    last[row] = tokens[right]
            if self.drafts is not None:
                self.drafts.end()
        if last:
            self._go_on_from([*last], torch.tensor([*last.values()]))

    def _tell(self, row: int, state: Any, tokens: list[int], logprobs: list[float | None]) -> None:
        """Add tokens to a request's answer; they may end it."""
        for token, logprob in zip(tokens, logprobs, strict=False):
            is_end = state.update_and_check_completion(token, logprob)
            if state.streaming or is_end:
                self._results.append(state.to_generation_output())
            if is_end:
                self._end(row)
                return

    def _end(self, row: int) -> None:
        """Forget a text."""
        del self.active[row]
        self.texts.free(row)
        if self.drafts is not None:
            self.drafts.texts.pop(row, None)

    def _end_all(self) -> None:
        """Forget all texts."""
        self.chosen = []
        for row in list(self.active):
            self._end(row)

    def _cancel(self, request_id: str) -> None:
        """End a request, of which nothing more is told."""
        for row, state in list(self.active.items()):
            if state.request_id == request_id:
                self._end(row)
        self.waiting = deque(x for x in self.waiting if x.request_id != request_id)
        for state in [] if self.reading is None else self.reading.states:
            if state.request_id == request_id:
                state.status = RequestStatus.FINISHED


def _ends(state: Any) -> set[int]:
    """Ids that end a request's answer."""
    found = state.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _turn(state: Any) -> float:
    """Smaller for requests that are read earlier."""
    longest = MAX_TURN_SECONDS / TURN_SECONDS
    return state.created_time - TURN_SECONDS * min(state.max_new_tokens or longest, longest)


def _common(text: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common, of those a multiple of `PREFIX_TOKENS`."""
    start, size = 0, PREFIX_TOKENS
    longest = min(len(text), len(other)) - size
    while start <= longest and text[start : start + size] == other[start : start + size]:
        start += size
    return start


def most_rows(config: Any) -> int:
    """Rows of a recorded step, at most, as a power of two."""
    return min(MAX_ROWS, power_below(MAX_PAIRS // (config.num_experts_per_token or 1)))
