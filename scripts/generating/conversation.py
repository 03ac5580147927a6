"""A conversation with a model: history, streaming, tools that run here, saving and loading.

Nothing in here reads or writes a terminal; `chat.py` does.
"""

import contextlib
import inspect
import itertools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from kimi_linear.tokenizer import Answer, AnswerReader, ToolCall, encode_chat
from kimi_linear.tokenizer.special_tokens import EOS_TOKENS

FORMAT = "kimi-linear-chat"
VERSION = 1
# Answers to one message: a model that calls tools for ever is stopped.
MAX_ROUNDS = 8


@dataclass
class Turn:
    """One answer of the model, and what it took.

    Attributes:
        answer: The answer.
        num_prompt_tokens: Tokens of the conversation before it.
        num_reused_tokens: How many of them were in the cache from the answer before.
        num_tokens: Tokens of the answer.
        seconds: Time for both.
        first_seconds: Time until the answer's first token.
        is_stopped: Whether the user stopped it.
        results: What each of its tool calls gave: the call and its result.
    """

    answer: Answer
    num_prompt_tokens: int
    num_reused_tokens: int
    num_tokens: int
    seconds: float
    first_seconds: float
    is_stopped: bool
    results: list[tuple[ToolCall, str]] = field(default_factory=list)


class AnswerStreamer(BaseStreamer):
    """Hands an answer's text on while it is generated, tool calls left out.

    Args:
        tokenizer: The model's tokenizer.
        write: Gets each piece of text, of whole characters.

    Attributes:
        reader: What has been read.
        ids: All that came.
        first_at: When the first one came, by `time.perf_counter`; None before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]) -> None:
        self.reader = AnswerReader(tokenizer)
        self.ids: list[int] = []
        self.first_at: float | None = None
        self._write = write
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids [1, T] first, then those of the answer, [1] each."""
        if self._is_prompt:
            self._is_prompt = False
            return
        if self.first_at is None:
            self.first_at = time.perf_counter()
        for token in value.flatten().tolist():
            self.ids.append(token)
            self._show(self.reader.put(token))

    def end(self) -> None:
        """Hand on what is left of the last character."""
        self._show(self.reader.end())

    def _show(self, text: str) -> None:
        if text:
            self._write(text)


class StopFlag(StoppingCriteria):
    """Stops a generation, after the token at hand, once it is set."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.is_set, device=input_ids.device)

    @contextlib.contextmanager
    def set_by_interrupt(self) -> Iterator[None]:
        """Have the first Ctrl-C set the flag; the second one interrupts as ever."""

        def handle(*_: Any) -> None:
            if self.is_set:
                raise KeyboardInterrupt
            self.is_set = True

        try:
            before = signal.signal(signal.SIGINT, handle)
        except ValueError:  # only the main thread may
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def read_messages(path: str | os.PathLike[str]) -> Any:
    """The messages of a file that `Chat.save` wrote, as they are.

    Raises:
        ValueError: The file is none.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else ()
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} holds no chat; allowed: what /save wrote")
    return content.get("messages")


class Chat:
    """A conversation.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer, one that `convert_tokenizer.py` or `convert_tiktoken` made.
        system: System message; None: none.
        tools: Functions that the model may call, by name; each takes and gives what JSON can hold
            and raises ValueError for the model to read.
        max_new_tokens: Of one answer.
        generate_options: What else `generate()` gets.

    Attributes:
        messages: The conversation, as the chat template takes it.

    Raises:
        ValueError: The tokenizer has no chat format, or an argument is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        tools: dict[str, Callable[..., Any]] | None = None,
        max_new_tokens: int = 1024,
        generate_options: dict[str, Any] | None = None,
    ) -> None:
        if getattr(tokenizer, "response_template", None) is None or not tokenizer.chat_template:
            raise ValueError(
                "tokenizer has no chat format; allowed: one that convert_tokenizer.py made"
            )
        if max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is not allowed: it must be at least 1"
            )
        self.model, self.tokenizer = model, tokenizer
        self.system, self.tools = system, tools or {}
        self.max_new_tokens = max_new_tokens
        self.generate_options = generate_options or {}
        self.messages: list[dict[str, Any]] = []
        # What the last answer left: the cache, and the ids that are in it.
        self._cache: Cache | None = None
        self._cached_ids: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str, write: Callable[[str], Any] = lambda _: None) -> Iterator[Turn]:
        """Say something, and run the tools that the answer calls until one calls none.

        Args:
            text: What the user says; encoded as text, whatever it spells.
            write: Gets the answers' text while it comes.

        Yields:
            Every answer, when it is complete and its tools have run.

        Raises:
            ValueError: The conversation is longer than the model's context, or `text` is no valid
                Unicode text. The conversation is then as it was before.
            KeyboardInterrupt: The user interrupted twice. Likewise.
        """
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            for _ in range(MAX_ROUNDS):
                turn = self._answer(write)
                self.messages.append(turn.answer.message())
                for call in turn.answer.tool_calls:
                    if call.problem is None and not turn.is_stopped:
                        turn.results.append((call, self._run(call)))
                # A call without a result would leave the model waiting.
                if len(turn.results) < len(self.messages[-1].get("tool_calls", [])):
                    self.messages[-1].pop("tool_calls")
                for call, result in turn.results:
                    message = {"role": "tool", "tool_call_id": call.id, "name": call.name}
                    self.messages.append({**message, "content": result})
                yield turn
                if not turn.results:
                    return
        except (Exception, KeyboardInterrupt):
            del self.messages[before:]
            raise

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a JSON file, which is never half written.

        Raises:
            OSError: It cannot be written.
        """
        target = Path(path).resolve()
        content = {"format": FORMAT, "version": VERSION, "messages": self.messages}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".chat-") as folder:
            made = Path(folder) / "chat"
            made.write_text(text, encoding="utf-8")
            made.replace(target)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a conversation that was saved, and with its system message if it has one.

        Args:
            path: What `save` wrote.

        Raises:
            ValueError: The file is none, or holds what the chat template refuses. The conversation
                is then as it was before.
            OSError: It cannot be read.
        """
        messages = read_messages(path)
        if messages != []:
            try:
                encode_chat(self.tokenizer, messages)
            except (TemplateError, ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}: {error}") from error
        self.messages = messages
        is_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if is_system else None

    def _answer(self, write: Callable[[str], Any]) -> Turn:
        """Let the model answer the conversation as it stands."""
        prompt = encode_chat(
            self.tokenizer,
            self.messages,
            tools=list(self.tools.values()),
            add_generation_prompt=True,
            return_tensors="pt",
        ).to(self.model.device)
        ids: list[int] = prompt["input_ids"][0].tolist()
        length, most = len(ids), self.tokenizer.model_max_length
        if length >= most:
            raise ValueError(f"the conversation has {length:,} tokens; allowed: below {most:,}")
        streamer, stop = AnswerStreamer(self.tokenizer, write), StopFlag()
        started = time.perf_counter()
        cache, num_reused = self._cache_for(ids)
        with torch.inference_mode(), stop.set_by_interrupt():
            self.model.generate(
                **prompt,
                cache=cache,
                max_new_tokens=min(self.max_new_tokens, most - length),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.convert_tokens_to_ids(list(EOS_TOKENS)),
                streamer=streamer,
                stopping_criteria=[stop],
                **self.generate_options,
            )
        ended = time.perf_counter()
        self._cache = cache
        self._cached_ids = [*ids, *streamer.ids][: cache.get_seq_length()]
        return Turn(
            answer=streamer.reader.answer(),
            num_prompt_tokens=length,
            num_reused_tokens=num_reused,
            num_tokens=len(streamer.ids),
            seconds=ended - started,
            first_seconds=(streamer.first_at or ended) - started,
            is_stopped=stop.is_set,
        )

    def _cache_for(self, ids: list[int]) -> tuple[Cache, int]:
        """A cache that holds a part of the prompt from the answer before, and how many tokens.

        Until the answer is complete the chat has none: an interrupted one leaves it in between.
        """
        cache, self._cache = self._cache, None
        pairs = zip(ids[:-1], self._cached_ids, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if cache is not None and shared:
            try:
                if shared < len(self._cached_ids):
                    cache.crop(shared - len(self._cached_ids))
                return cache, shared
            except (ValueError, NotImplementedError):
                pass  # it cannot go back so far
        return DynamicCache(config=self.model.config), 0

    def _run(self, call: ToolCall) -> str:
        """A tool's result as text, or what the model is to know of its failure."""
        tool = self.tools.get(call.name)
        if tool is None:
            return (
                f"error: no tool is named {call.name}; allowed: {', '.join(self.tools) or 'none'}"
            )
        try:
            arguments = inspect.signature(tool).bind(**call.arguments)
        except TypeError as error:
            return f"error: {error}"
        try:
            result = tool(*arguments.args, **arguments.kwargs)
        except (ValueError, TypeError, AttributeError) as error:
            return f"error: {error}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
