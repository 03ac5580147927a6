"""Decoding of one text with drafts from the text itself, at the pace of decoding without.

As long as no draft is expected to pay, steps are those of plain `generate()`: tokens are chosen on
the device, and on a GPU the host looks at each while the next step runs already. A draft behind a
token that the host has not seen is a guess of that token too; if it was wrong, so are all behind
it. What a drafted step has chosen says where the next one begins, so the host waits for it.

Shapes: N tokens of a step, S of the text, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.cache.pending import STEP_TOKENS
from kimi_linear.generation.host_copy import HostCopy
from kimi_linear.generation.lookup import PromptLookup, num_right
from kimi_linear.upstream.late_stop import LATE_DEVICE_TYPES
from kimi_linear.upstream.lookup_call import LookupCall


@dataclass
class Step:
    """A forward that was launched.

    Attributes:
        draft: The tokens that it read behind the text.
        chosen: The tokens behind each that it read, and, if criteria have looked at a step without
            a draft, 1 if they end the text.
        behind: Tokens that were drafted in the step before it, if that was waited for.
    """

    draft: list[int]
    chosen: HostCopy
    behind: int


class LookupLoop:
    """One run.

    Args:
        model: A `KimiLinearForCausalLM`.
        call: What is asked for.
        drafts: What to draft, with nothing of the text yet.
    """

    def __init__(self, model: Any, call: LookupCall, drafts: PromptLookup) -> None:
        self.model, self.call, self.drafts = model, call, drafts
        device = call.ids.device
        self.is_late = device.type in LATE_DEVICE_TYPES
        self.ids = F.pad(call.ids, (0, STEP_TOKENS))  # [1, room for more]
        self.num_chosen = call.ids.shape[1]  # tokens of the text, with those on their way
        self.num_hidden = 0  # tokens that the cache has, but not `ids`
        self.is_over = False
        # another cache keeps what a crop needs for one draft alone, and then reads little again
        self.is_logged = call.cache.is_croppable or self.is_late
        if self.is_logged:
            call.cache.activate_past_recording()

    @property
    def num_known(self) -> int:
        """Tokens of the text that the host has seen."""
        return len(self.drafts.finder.tokens)

    def run(self) -> Tensor:
        """The whole text [1, S]."""
        call, behind = self.call, 0
        prompt = call.ids[0].tolist()
        logits = call.prefill(self.model)
        self.num_hidden = call.cache.get_seq_length() - self.num_chosen
        last: Step | None = self._choose(logits, [], behind)
        self.drafts.extend(prompt)  # while the device reads it
        with call.decoding(self.model):
            while not self.is_over:
                step = None
                if last is None or self._may_go_on(last):
                    step = self._launch(self.drafts.draft(int(last is not None)), behind)
                if last is not None:
                    self._take(last)
                behind = len(last.draft) if last is not None and step is None else 0
                last = step
        self._take_back()
        if call.streamer is not None:
            call.streamer.end()
        return self.ids[:, : self.num_known].clone()

    def _may_go_on(self, step: Step) -> bool:
        """Whether another step can follow before the host has seen what this one chose."""
        return self.is_late and not step.draft and self.num_chosen < self.call.max_length

    def _launch(self, draft: list[int], behind: int) -> Step:
        """Read the last token and a draft."""
        end = self.num_chosen
        stop = end + len(draft)
        if stop >= self.ids.shape[1]:
            self.ids = F.pad(self.ids, (0, self.ids.shape[1]))
        if draft:
            self.ids[0, end:stop] = self._on_device(draft)
            if not self.is_logged:
                self.call.cache.begin_draft()
        ids = self.ids[:, end - 1 : stop]
        logits = self.model(input_ids=ids, cache=self.call.cache).logits
        return self._choose(logits, draft, behind)

    def _on_device(self, draft: list[int]) -> Tensor:
        """[N], without a wait for the device."""
        device = self.ids.device
        ids = torch.tensor(draft, pin_memory=device.type == "cuda")
        return ids.to(device, non_blocking=True)

    def _choose(self, logits: Tensor, draft: list[int], behind: int) -> Step:
        """Choose a token behind each that was read: logits [1, N, V]."""
        end, call = self.num_chosen, self.call
        scores = logits[0].to(self.ids.device, torch.float32, copy=True)
        if call.processors:
            rows = [
                call.processors(self.ids[:, : end + i], row)
                for i, row in enumerate(scores.split(1))
            ]
            scores = torch.cat(rows)
        if call.config.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        self.num_chosen = end + len(draft) + 1
        self.ids[0, end : self.num_chosen] = tokens
        if call.criteria and not draft:
            is_end = call.criteria(self.ids[:, : self.num_chosen], None)
            tokens = torch.cat([tokens, is_end.to(tokens)])
        return Step(draft, HostCopy(tokens), behind)

    def _take(self, step: Step) -> None:
        """Wait for a step, and take what belongs to the text."""
        drafted = len(step.draft)
        tokens = step.chosen.tolist()
        self.drafts.length.take_time(drafted, step.behind)
        right = num_right(step.draft, tokens)
        new: list[int] = []
        while len(new) <= right and not self.is_over:
            new.append(tokens[len(new)])
            self.is_over = self._is_end(new, any(tokens[drafted + 1 :]), drafted)
        self.drafts.extend(new)
        if self.call.streamer is not None:
            for token in new:
                self.call.streamer.put(torch.tensor([token]))
        if drafted:
            self.num_chosen = self.num_known
            self._take_back()
            if not self.is_logged:
                self.call.cache.end_draft()

    def _is_end(self, new: list[int], is_end: bool, drafted: int) -> bool:
        """Whether the text ends with the last of its new tokens."""
        length = self.num_known + len(new)
        if length >= self.call.max_length or new[-1] in self.call.ends:
            return True
        if self.call.criteria and drafted:
            return bool(self.call.criteria(self.ids[:, :length], None))
        return is_end

    def _take_back(self) -> None:
        """Leave in the cache what comes before the last token, which no step has read."""
        cache = self.call.cache
        cache.crop(self.num_hidden + self.num_known - 1 - cache.get_seq_length())
