"""Conversations to token ids, with no way for the text in them to pass for their structure.

`tokenizer.apply_chat_template` renders a conversation to one string and encodes that, so a message
that spells `<|im_end|><|im_system|>` ends its turn and begins another. `encode_chat` renders with
the same template, but only what the template itself wrote becomes special tokens; the same words in
a message, a name, a tool's description or its result are plain text. Where no text spells a special
token both give the same ids.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from kimi_linear.tokenizer.marks import (
    map_strings,
    mark_beginnings,
    special_tokens_pattern,
    unused_character,
)
from kimi_linear.tokenizer.special_tokens import ASSISTANT_TOKEN, CHAT_EOS_TOKEN, MIDDLE_TOKEN
from kimi_linear.tokenizer.text import check_text

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# Of apply_chat_template, and not here: the result is one conversation, whole, in a BatchEncoding.
_NOT_SUPPORTED = (
    "max_length",
    "padding",
    "return_dict",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)


def chat_template() -> str:
    """The jinja template of the chat format: see `chat_template.jinja` beside this file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    return_assistant_tokens_mask: bool = False,
    return_tensors: str | None = None,
    **template_kwargs: Any,
) -> "BatchEncoding":
    """Encode one conversation; text inside it never becomes a special token.

    Args:
        tokenizer: A fast tokenizer of this family.
        messages: The conversation, as `apply_chat_template` takes it, of dicts, lists and strings.
        tools: JSON schemas of the tools, or functions with type hints and a docstring.
        chat_template: Another template than the tokenizer's; it must not build special tokens out
            of pieces of its input.
        add_generation_prompt: End with the beginning of an answer.
        continue_final_message: Leave the last message open, for the model to go on with.
        return_assistant_tokens_mask: Also return `assistant_masks`.
        return_tensors: "pt" or "np" for [1, T] tensors instead of lists; None: lists of T.
        **template_kwargs: What else the template reads.

    Returns:
        `input_ids`, `attention_mask` (all 1), and on request `assistant_masks`: 1 at the tokens
        that the assistant wrote, tool calls and the `<|im_end|>` of its turns included.

    Raises:
        ValueError: There is no message, something in the conversation is no text (named by its
            path), is nested too deeply or can't be tokenized (see `check_text`), `tools` is no list
            of them, an argument of `apply_chat_template` is not supported, or the tokenizer is not
            a fast one.
        jinja2.TemplateError: The template refuses the conversation; it names the message.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"tokenizer is {type(tokenizer).__name__}; allowed: a fast tokenizer")
    _check_messages(messages)
    for name in sorted(template_kwargs.keys() & set(_NOT_SUPPORTED)):
        raise ValueError(f"{name}={template_kwargs[name]!r} is not supported: leave it out")
    inputs = {"messages": messages, "tools": _schemas(tools), "template_kwargs": template_kwargs}
    mark = unused_character(_texts(inputs))
    marked = {
        where: map_strings(value, lambda text, _: mark_beginnings(text, mark), where)
        for where, value in inputs.items()
    }
    rendered = tokenizer.apply_chat_template(
        marked["messages"],
        tools=marked["tools"],
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tokenize=False,
        **marked["template_kwargs"],
    )
    ids = _encode_marked(tokenizer, rendered, mark)
    encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if return_assistant_tokens_mask:
        encoded["assistant_masks"] = assistant_tokens_mask(tokenizer, ids)
    from transformers import BatchEncoding

    return BatchEncoding(
        encoded, tensor_type=return_tensors, prepend_batch_axis=return_tensors is not None
    )


def assistant_tokens_mask(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[int]:
    """Which tokens of an encoded conversation the assistant wrote.

    Args:
        tokenizer: The tokenizer of the ids.
        ids: T token ids, turn by turn.

    Returns:
        T numbers, 1 from behind `<|im_assistant|>NAME<|im_middle|>` to `<|im_end|>`, that included.
    """
    begin, middle, end = tokenizer.convert_tokens_to_ids(
        [ASSISTANT_TOKEN, MIDDLE_TOKEN, CHAT_EOS_TOKEN]
    )
    mask, in_name, in_answer = [], False, False
    for token in ids:
        mask.append(int(in_answer))
        if in_answer:
            in_answer = token != end
        elif in_name and token == middle:
            in_name, in_answer = False, True
        elif token == begin:
            in_name = True
    return mask


def encode_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Encode texts as text only: no special token comes out, whatever they spell.

    Args:
        tokenizer: A fast tokenizer. Its `split_special_tokens` would still find the tool call
            tokens, which are not special in Transformers' sense.
        texts: The texts.

    Returns:
        Token ids of each.

    Raises:
        ValueError: A text can't be tokenized (see `check_text`).
    """
    texts = [check_text(text, f"texts[{index}]") for index, text in enumerate(texts)]
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)  # shares the vocabulary, and has no added tokens
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    return [encoding.ids for encoding in plain.encode_batch_fast(texts)]


def _encode_marked(tokenizer: "PreTrainedTokenizerBase", text: str, mark: str) -> list[int]:
    """Ids of a rendered conversation: tokens where it has them unmarked, text between them."""
    pattern = special_tokens_pattern(tokenizer)
    between = [piece.replace(mark, "") for piece in pattern.split(text)]
    structure = tokenizer.convert_tokens_to_ids(pattern.findall(text))
    ids: list[int] = []
    for index, plain in enumerate(encode_plain(tokenizer, between)):
        ids += plain
        ids += structure[index : index + 1]
    return ids


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple):
        raise ValueError(
            f"messages is of type {type(messages).__name__}; allowed: a list of messages"
        )
    if not messages:
        raise ValueError("messages is empty; allowed: at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"messages[{index}] is of type {type(message).__name__}; allowed: a dict"
            )


def _texts(inputs: Mapping[str, Any]) -> list[str]:
    """All strings of the inputs, checked."""
    texts: list[str] = []

    def note(text: str, where: str) -> str:
        texts.append(check_text(text, where))
        return text

    for where, value in inputs.items():
        map_strings(value, note, where)
    return texts


def _schemas(
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None,
) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools is of type {type(tools).__name__}; allowed: a list of tools")
    for index, tool in enumerate(tools):
        if not callable(tool) and not isinstance(tool, Mapping):
            kind = type(tool).__name__
            raise ValueError(f"tools[{index}] is of type {kind}; allowed: a dict or a function")
    from transformers.utils import get_json_schema

    return [get_json_schema(tool) if callable(tool) else tool for tool in tools] or None
