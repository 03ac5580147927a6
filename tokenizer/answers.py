"""Answers of the model, taken apart: text, tool calls with their arguments, and what is broken.

`RESPONSE_TEMPLATE` is what Transformers' own parser reads, from `tokenizer_config.json`: with it
`tokenizer.parse_response`, its streaming form, the text-generation pipeline and `transformers
serve` know the format. They work on decoded text. `parse_answer` uses the same template, but starts
from the ids: a model that merely repeats the words `<|tool_call_begin|>` calls nothing. And it says
what is wrong with a call that is broken or cut off.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .marks import map_strings, mark_tokens, special_tokens_pattern, unused_character
from .special_tokens import EOS_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECTION_BEGIN = "<|tool_calls_section_begin|>"
_SECTION_END = "<|tool_calls_section_end|>"
_ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
_CALL_END = "<|tool_call_end|>"

# A piece of a call that has no readable name, or a lone token of one.
_STRAY = re.compile(
    r"<\|tool_call_(?:begin|argument_begin)\|>.*?(?:<\|tool_call_end\|>|\Z)|<\|tool_call_end\|>",
    re.DOTALL,
)

# Text regions are joined: by default the last one would replace what comes before a call. Arguments
# that are no JSON stay text.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor_pattern": r"<\|im_assistant\|>[^<]*<\|im_middle\|>",
    "fields": {
        "tool_calls": {
            "open_pattern": (
                r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
                r"(?P<id>(?:functions\.)?(?P<name>[^\s<]+?)(?::\d+)?)\s*"
                r"<\|tool_call_argument_begin\|>"
            ),
            "close": [_CALL_END, _SECTION_END, *EOS_TOKENS],
            "repeats": True,
            "content": "json",
            "content_args": {"allow_non_json": True},
            "transform": {
                "type": "function",
                "id": "{id}",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {
            "close": [_SECTION_BEGIN, _SECTION_END, *EOS_TOKENS, "[EOT]", "[PAD]"],
            "content": "text",
            "content_args": {"strip": False},
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
        problems: All that is wrong, in words: broken calls, and pieces of calls without a name.
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


def parse_answer(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, prefix: Sequence[int] = ()
) -> Answer:
    """Take an answer apart.

    Args:
        tokenizer: A tokenizer with a `response_template`.
        ids: The generated ids, one sequence, without the prompt; padding behind it may be there.
        prefix: The ids before them, if they hold the beginning of the answer
            (`continue_final_message`), which then is part of it.

    Returns:
        The answer. Broken input gives what was readable, and `problems`.

    Raises:
        ValueError: The tokenizer has no `response_template`.
    """
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        raise ValueError(
            "tokenizer has no response_template; allowed: one that convert_tiktoken made"
        )
    ids, prefix = [int(i) for i in ids], [int(i) for i in prefix]
    ends = set(tokenizer.convert_tokens_to_ids(list(EOS_TOKENS)))
    end = next((at for at, token in enumerate(ids) if token in ends), None)
    is_finished = end is not None
    pieces = [_pieces(tokenizer, part) for part in (prefix, ids[:end])]
    mark = unused_character(text for part in pieces for text, _ in part)
    start, answer = (_marked(tokenizer, part, mark) for part in pieces)
    parsed = tokenizer.parse_response(answer, _with_text_arguments(template), prefix=start)
    # What is left of tool tokens in the text are pieces of calls that have no readable name.
    content, stray = _split_stray(parsed["content"])
    content = content.replace(mark, "")
    problems = [f"not a tool call: {piece.replace(mark, '')!r}" for piece in stray]
    found = parsed.get("tool_calls", [])
    closed = max(answer.rfind(_CALL_END), answer.rfind(_SECTION_END))
    is_open = answer.rfind(_ARGUMENTS_BEGIN) > closed
    calls = [
        _tool_call(
            map_strings(call, lambda text, _: text.replace(mark, ""), "tool_calls"),
            is_cut_off=is_open
            and index == len(found) - 1
            and answer.endswith(call["function"]["arguments"]),
        )
        for index, call in enumerate(found)
    ]
    problems += [f"{call.id}: {call.problem}" for call in calls if call.problem]
    return Answer(content, calls, is_finished, problems)


def _pieces(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[tuple[str, bool]]:
    """Text and special tokens in turn, each with whether it is a token."""
    special = {token_id: name for name, token_id in tokenizer.get_added_vocab().items()}
    pieces: list[tuple[str, bool]] = []
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in special:
            run.append(token)
            continue
        if run:
            pieces.append((tokenizer.decode(run), False))
            run = []
        if token is not None:
            pieces.append((special[token], True))
    return pieces


def _marked(tokenizer: "PreTrainedTokenizerBase", pieces: list[tuple[str, bool]], mark: str) -> str:
    """The pieces as one text, tokens that are only spelled marked."""
    pattern = special_tokens_pattern(tokenizer)
    return "".join(
        text if is_token else mark_tokens(text, pattern, mark) for text, is_token in pieces
    )


def _with_text_arguments(template: dict[str, Any]) -> dict[str, Any]:
    """The template with arguments left as text, so that they can be shown as they are."""
    as_text = {"content": "text", "content_args": {"strip": False}}
    calls = {**template["fields"]["tool_calls"], **as_text}
    return {**template, "fields": {**template["fields"], "tool_calls": calls}}


def _split_stray(content: str) -> tuple[str, list[str]]:
    """Text, and what stands in it of calls that could not be read."""
    return _STRAY.sub("", content), _STRAY.findall(content)


def _tool_call(call: dict[str, Any], is_cut_off: bool) -> ToolCall:
    """A parsed call, its arguments read."""
    function = call["function"]
    name, text = function["name"], function["arguments"]
    problem: str | None = None
    try:
        arguments = json.loads(text)
        if not isinstance(arguments, dict):
            problem = f"the arguments are {type(arguments).__name__}, not an object"
    except (ValueError, RecursionError) as error:
        problem = f"the arguments are not JSON ({error})"
    if is_cut_off:
        problem = "cut off before the end of the call"
    return ToolCall(call["id"], name, {} if problem else arguments, text, problem)
