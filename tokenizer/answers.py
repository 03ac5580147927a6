"""Answers of the model, taken apart: text, tool calls with their arguments, and what is broken.

`response_template` is what Transformers' own parser reads, from `tokenizer_config.json`: with it
`tokenizer.parse_response`, its streaming form, the text-generation pipeline and `transformers
serve` know the format. They work on decoded text. `AnswerReader` and `parse_answer` read ids, in
linear time: a model that merely repeats the words `<|tool_call_begin|>` calls nothing. And they say
what is wrong with a call that is broken or cut off.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kimi_linear.tokenizer.special_tokens import (
    ASSISTANT_TOKEN,
    CHAT_EOS_TOKEN,
    EOS_TOKENS,
    MIDDLE_TOKEN,
    PAD_TOKEN,
)
from kimi_linear.tokenizer.streaming import StreamDecoder, check_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECTION_BEGIN = "<|tool_calls_section_begin|>"
_SECTION_END = "<|tool_calls_section_end|>"
_CALL_BEGIN = "<|tool_call_begin|>"
_ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
_CALL_END = "<|tool_call_end|>"
_HEADER = r"(?P<id>(?:functions\.)?(?P<name>[^\s<]+?)(?::\d+)?)"


def response_template(eos_token: str) -> dict[str, Any]:
    """What Transformers' parser of answers reads.

    Args:
        eos_token: What ends an answer, beside `<|im_end|>`. As it is looked for in text, an answer
            that spells it ends there.

    Returns:
        The value of `response_template` in `tokenizer_config.json`.
    """
    ends = "|".join(re.escape(token) for token in sorted({CHAT_EOS_TOKEN, eos_token}))
    end = f"(?:{ends})(?:{re.escape(PAD_TOKEN)})*"
    sections = f"{re.escape(_SECTION_BEGIN)}|{re.escape(_SECTION_END)}"
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor_pattern": (
            rf"{re.escape(ASSISTANT_TOKEN)}(?:(?!<\|im_).)*{re.escape(MIDDLE_TOKEN)}"
        ),
        "fields": {
            "tool_calls": {
                "open_pattern": (
                    rf"(?:{re.escape(_SECTION_BEGIN)}\s*)?{re.escape(_CALL_BEGIN)}\s*{_HEADER}\s*"
                    rf"{re.escape(_ARGUMENTS_BEGIN)}"
                ),
                "close_pattern": f"{re.escape(_CALL_END)}|{re.escape(_SECTION_END)}|{end}",
                "repeats": True,
                "content": "json",
                "content_args": {"allow_non_json": True},  # else a call that is cut off is an error
                "transform": {
                    "type": "function",
                    "id": "{id}",
                    "function": {"name": "{name}", "arguments": "{content}"},
                },
            },
            "content": {
                "close_pattern": f"{sections}|{end}",
                "content": "text",
                "content_args": {"strip": False},
                # joined: by default the last region would replace what comes before a call
                "repeats": True,
                "join": "",
            },
        },
    }


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool.

    Attributes:
        id: `functions.NAME:INDEX`, as the model wrote it.
        name: NAME.
        arguments: The arguments; {} if they cannot be read.
        text: Their JSON text, as the model wrote it.
        problem: What is wrong with the call; None if nothing is. Do not run a call that has one.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    text: str
    problem: str | None = None


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Attributes:
        content: The text, "" if there is none.
        tool_calls: The calls, broken ones included, in order.
        is_finished: Whether an end token came; if not, the answer was cut off.
        problems: All that is wrong, in words: broken calls, pieces of calls without a name, and
            text in the section of calls that is in none.
    """

    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    is_finished: bool = True
    problems: list[str] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """The answer as a message of a conversation, with the calls that can be run."""
        calls = [
            {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": c.text}}
            for c in self.tool_calls
            if c.problem is None
        ]
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        return {**message, "tool_calls": calls} if calls else message


class AnswerReader:
    """Reads an answer's ids one by one: shows its text as it comes, and takes all of it apart.

    Args:
        tokenizer: A tokenizer of this family.

    Raises:
        ValueError: The tokenizer lacks a token of the chat format.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        added = tokenizer.get_added_vocab()
        format_tokens = (_SECTION_BEGIN, _SECTION_END, _CALL_BEGIN, _ARGUMENTS_BEGIN, _CALL_END)
        for name in (*format_tokens, *EOS_TOKENS):
            if name not in added:
                raise ValueError(
                    f"tokenizer has no token {name}; allowed: one that convert_tiktoken made"
                )
        self._name_of = {added[name]: name for name in format_tokens}
        self._ends = {added[name] for name in EOS_TOKENS}
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._problems: list[str] = []
        self._is_section = self._is_finished = False
        # of the call at hand: None, or the pieces so far of its header, then of its arguments
        self._header: list[str] | None = None
        self._arguments: list[str] | None = None
        self._loose: list[str] = []

    def put(self, token_id: int) -> str:
        """Take the next id; those behind an end token are left out.

        Returns:
            The text that it completes, as far as it is for the reader; "" for what belongs to tool
            calls.

        Raises:
            ValueError: `token_id` is none, see `StreamDecoder.put`.
        """
        if self._is_finished:
            return ""
        token_id = check_id(token_id)
        if token_id in self._ends:
            self._is_finished = True
            return self._take(self._decoder.end())
        name = self._name_of.get(token_id)
        if name is None:
            return self._take(self._decoder.put(token_id))
        shown = self._take(self._decoder.end())
        self._switch(name)
        return shown

    def end(self) -> str:
        """End the answer; what is left of a character comes as U+FFFD."""
        return self._take(self._decoder.end())

    def answer(self) -> Answer:
        """What was read so far."""
        calls, problems = list(self._calls), list(self._problems)
        if self._header is not None:
            call = self._read_call("cut off before the end of the call")
            if isinstance(call, str):
                problems.append(call)
            else:
                calls.append(call)
        problems += [f"{call.id}: {call.problem}" for call in calls if call.problem]
        loose = "".join(self._loose)
        if loose.strip():
            problems.append(f"text between tool calls: {loose!r}")
        return Answer("".join(self._content), calls, self._is_finished, problems)

    def _take(self, text: str) -> str:
        """Add text to the part that is being read; returns what is shown."""
        if not self._is_section and self._header is None:
            self._content.append(text)
            return text
        pieces = self._loose if self._header is None else self._header
        (pieces if self._arguments is None else self._arguments).append(text)
        return ""

    def _switch(self, name: str) -> None:
        """Continue behind a token of the format."""
        if name == _ARGUMENTS_BEGIN and self._header is not None and self._arguments is None:
            self._arguments = []
        elif name == _ARGUMENTS_BEGIN or (name == _CALL_END and self._header is None):
            self._problems.append(f"not a tool call: {name!r}")
        else:
            # a call may be closed by the next one, and by the end of the section
            self._close_call()
            self._header = [] if name == _CALL_BEGIN else None
            if name in (_SECTION_BEGIN, _SECTION_END):
                self._is_section = name == _SECTION_BEGIN

    def _close_call(self) -> None:
        if self._header is None:
            return
        call = self._read_call(None)
        if isinstance(call, str):
            self._problems.append(call)
        else:
            self._calls.append(call)
        self._header = self._arguments = None

    def _read_call(self, problem: str | None) -> ToolCall | str:
        """The call at hand, or in words why it is none."""
        header = "".join(self._header or [])
        text = None if self._arguments is None else "".join(self._arguments)
        match = re.fullmatch(_HEADER, header.strip())
        if match is None or text is None:
            pieces = [_CALL_BEGIN, header] + ([] if text is None else [_ARGUMENTS_BEGIN, text])
            return f"not a tool call: {''.join(pieces)!r}"
        arguments: Any = {}
        if problem is None:
            try:
                arguments = json.loads(text)
                if not isinstance(arguments, dict):
                    problem = f"the arguments are {type(arguments).__name__}, not an object"
            except (ValueError, RecursionError) as error:
                problem = f"the arguments are not JSON ({error})"
        return ToolCall(match["id"], match["name"], {} if problem else arguments, text, problem)


def parse_answer(
    tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int], *, prefix: Sequence[int] = ()
) -> Answer:
    """Take an answer apart.

    Args:
        tokenizer: A tokenizer of this family.
        ids: The generated ids, one sequence, without the prompt; what stands behind an end token,
            such as padding, is left out.
        prefix: The ids before them, if they hold the beginning of the answer
            (`continue_final_message`), which then is part of it.

    Returns:
        The answer. Broken input gives what was readable, and `problems`.

    Raises:
        ValueError: The tokenizer lacks a token of the chat format, or an id is none that a
            tokenizer can have.
    """
    reader = AnswerReader(tokenizer)
    begun = _begun(tokenizer, [check_id(token, f"prefix[{i}]") for i, token in enumerate(prefix)])
    given = [check_id(token, f"ids[{i}]") for i, token in enumerate(ids)]
    for token in begun + given:
        reader.put(token)
    reader.end()
    return reader.answer()


def _begun(tokenizer: "PreTrainedTokenizerBase", prefix: list[int]) -> list[int]:
    """The part of the answer that the prompt has: everything behind its last turn's header."""
    begin, middle = tokenizer.convert_tokens_to_ids([ASSISTANT_TOKEN, MIDDLE_TOKEN])
    if begin not in prefix:
        return prefix
    turn = prefix[len(prefix) - prefix[::-1].index(begin) :]
    return turn[turn.index(middle) + 1 :] if middle in turn else []
