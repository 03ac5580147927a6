"""A conversation with a model: history, streaming, tools that run here, saving and loading.

Nothing in here reads or writes a terminal; `chat.py` does.
"""

import contextlib
import inspect
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from kimi_linear.tokenizer import Answer, StreamDecoder, ToolCall, encode_chat, parse_answer
from kimi_linear.tokenizer.special_tokens import EOS_TOKENS
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

FORMAT = "kimi-linear-chat"
VERSION = 1
# Answers to one message: a model that calls tools for ever is stopped.
MAX_ROUNDS = 8
HIDDEN_FROM = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
HIDDEN_TO = ("<|tool_calls_section_end|>", "<|tool_call_end|>")


@dataclass
class Turn:
    """One answer of the model, and what it took.

    Attributes:
        answer: The answer.
        num_prompt_tokens: Tokens of the conversation before it.
        num_tokens: Tokens of the answer.
        seconds: Time for both.
        first_seconds: Time until the answer's first token.
        is_stopped: Whether the user stopped it.
        results: What each of its tool calls gave: the call and its result.
    """

    answer: Answer
    num_prompt_tokens: int
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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]) -> None:
        self.ids: list[int] = []
        self.first_at: float | None = None
        self._write = write
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._from, self._to = (
            set(tokenizer.convert_tokens_to_ids(list(names))) for names in (HIDDEN_FROM, HIDDEN_TO)
        )
        self._is_prompt, self._is_hidden = True, False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids [1, T] first, then those of the answer, [1] each."""
        if self._is_prompt:
            self._is_prompt = False
            return
        if self.first_at is None:
            self.first_at = time.perf_counter()
        for token in value.flatten().tolist():
            self.ids.append(token)
            if token in self._from | self._to:
                self._show(self._decoder.end())
                self._is_hidden = token in self._from
            elif not self._is_hidden:
                self._show(self._decoder.put(token))

    def end(self) -> None:
        """Hand on what is left of the last character."""
        self._show(self._decoder.end())

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
        ValueError: The tokenizer cannot parse answers, or an argument is out of range.
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
                "the tokenizer has no chat format; allowed: one that convert_tokenizer.py made"
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
        """Write the conversation to a JSON file, which is never half written."""
        target = Path(path)
        made = target.with_name(f".{target.name}.part")
        content = {"format": FORMAT, "version": VERSION, "messages": self.messages}
        made.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        made.replace(target)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a conversation that was saved.

        Args:
            path: What `save` wrote.

        Raises:
            ValueError: The file is none, or holds what the chat template refuses. The conversation
                is then as it was before.
            OSError: It cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error})") from error
        found = (content.get("format"), content.get("version")) if isinstance(content, dict) else ()
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path} holds no chat; allowed: what /save wrote")
        messages = content.get("messages")
        if messages != []:
            try:
                encode_chat(self.tokenizer, messages)
            except TemplateError as error:
                raise ValueError(f"{path}: {error}") from error
        self.messages = messages

    def _answer(self, write: Callable[[str], Any]) -> Turn:
        """Let the model answer the conversation as it stands."""
        prompt = encode_chat(
            self.tokenizer,
            self.messages,
            tools=list(self.tools.values()),
            add_generation_prompt=True,
            return_tensors="pt",
        ).to(self.model.device)
        length, most = prompt["input_ids"].shape[1], self.tokenizer.model_max_length
        if length >= most:
            raise ValueError(f"the conversation has {length:,} tokens; allowed: below {most:,}")
        streamer, stop = AnswerStreamer(self.tokenizer, write), StopFlag()
        started = time.perf_counter()
        with torch.inference_mode(), stop.set_by_interrupt():
            self.model.generate(
                **prompt,
                max_new_tokens=min(self.max_new_tokens, most - length),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.convert_tokens_to_ids(list(EOS_TOKENS)),
                streamer=streamer,
                stopping_criteria=[stop],
                **self.generate_options,
            )
        ended = time.perf_counter()
        return Turn(
            answer=parse_answer(self.tokenizer, streamer.ids),
            num_prompt_tokens=length,
            num_tokens=len(streamer.ids),
            seconds=ended - started,
            first_seconds=(streamer.first_at or ended) - started,
            is_stopped=stop.is_set,
        )

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
