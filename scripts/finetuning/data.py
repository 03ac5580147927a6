"""Datasets of finetune.py: any of the Hub, or local files, as each recipe wants its rows.

Text of a message can't pass for structure, see `kimi_linear.tokenizer.encode_chat`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from kimi_linear.tokenizer import encode_chat, encode_plain

IGNORED = -100
FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user"}
# Of Transformers' apply_chat_template, which TRL calls: text in messages stays text.
SANITIZED = {"sanitize_control_tokens": True}


def load_rows(dataset: str, config: str | None, split: str) -> Dataset:
    """Rows of a dataset of the Hub, of a local folder of one, or of one file.

    Raises:
        ValueError: If a file is of another kind than json, jsonl and parquet, or there are no rows.
    """
    path = Path(dataset)
    if path.is_file():
        kind = FILE_KINDS.get(path.suffix)
        if kind is None:
            raise ValueError(
                f"dataset={dataset!r} is not allowed: a file must end in {', '.join(FILE_KINDS)}"
            )
        rows = load_dataset(kind, data_files={split: str(path)}, split=split)
    else:
        rows = load_dataset(dataset, config, split=split)
    if not len(rows):
        raise ValueError(f"dataset={dataset!r} has no rows in split={split!r}")
    return rows


# -------------------------------------------------------------------------------------------- SFT
def sft_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str
) -> Dataset:
    """Token ids and labels.

    Args:
        rows: With `messages` (or `conversations` of `from` and `value`), or `prompt` and
            `completion` (text or messages), or `text`; `tools` beside messages, as a list or JSON.
        tokenizer: Of this family.
        max_length: T at most; the rest is cut off.
        loss_on: "assistant": what the assistant wrote, its `<|im_end|>` included; "all". Of a
            prompt and a completion only the completion counts, of a text every token.

    Returns:
        `input_ids` and `labels` of at most T numbers, -100 where there is no loss. Rows without a
        token to learn are left out.

    Raises:
        ValueError: If the columns are none of these, or nothing is left.
    """
    form = _sft_form(rows.column_names)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        ids, labels = form(tokenizer, row, loss_on)
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    encoded = rows.map(encode, remove_columns=rows.column_names, desc="Encoding")
    # The first token of a sequence is predicted from nothing.
    kept = encoded.filter(
        lambda row: any(label != IGNORED for label in row["labels"][1:]), desc="Checking"
    )
    if not len(kept):
        raise ValueError(
            f"none of {len(rows)} rows has a token to learn within max_length={max_length} "
            f"(loss_on={loss_on!r})"
        )
    if len(kept) < len(rows):
        print(f"left out {len(rows) - len(kept)} of {len(rows)} rows: nothing to learn in them")
    return kept


def _sft_form(columns: Sequence[str]) -> Any:
    if "messages" in columns or "conversations" in columns:
        return _encode_messages
    if {"prompt", "completion"} <= set(columns):
        return _encode_completion
    if "text" in columns:
        return _encode_text
    raise ValueError(
        f"the dataset has columns {', '.join(columns)}, which is not allowed: it must have "
        "messages, conversations, prompt and completion, or text"
    )


def _encode_messages(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], loss_on: str
) -> tuple[list[int], list[int]]:
    messages = to_messages(row.get("messages") or row.get("conversations"))
    return _encode(tokenizer, messages, _tools(row), loss_on)


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Any, loss_on: str
) -> tuple[list[int], list[int]]:
    encoded = encode_chat(tokenizer, messages, tools=tools, return_assistant_tokens_mask=True)
    ids, masks = list(encoded["input_ids"]), encoded["assistant_masks"]
    if loss_on == "all":
        return ids, list(ids)
    return ids, [token if mask else IGNORED for token, mask in zip(ids, masks, strict=True)]


def _encode_completion(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], loss_on: str
) -> tuple[list[int], list[int]]:
    if isinstance(row["prompt"], str):
        prompt, completion = encode_plain(tokenizer, [row["prompt"], row["completion"]])
        prompt = [tokenizer.bos_token_id, *prompt]
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]
    before, answer = to_messages(row["prompt"]), to_messages(row["completion"])
    start = encode_chat(tokenizer, before, tools=_tools(row), add_generation_prompt=True)
    ids, labels = _encode(tokenizer, [*before, *answer], _tools(row), loss_on)
    length = len(start["input_ids"])
    return ids, [IGNORED] * length + labels[length:]


def _encode_text(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], loss_on: str
) -> tuple[list[int], list[int]]:
    (text,) = encode_plain(tokenizer, [row["text"] or ""])
    ids = [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
    return ids, list(ids)


# ------------------------------------------------------------------------------------------- DPO
def dpo_rows(rows: Dataset) -> Dataset:
    """`prompt`, `chosen` and `rejected` as messages, for TRL.

    Args:
        rows: With `chosen` and `rejected`: texts, each an answer to the text in `prompt`, or
            messages, whole conversations or what follows the messages in `prompt`.

    Raises:
        ValueError: If the columns are none of these, or two conversations share no beginning.
    """
    names = rows.column_names
    if not {"chosen", "rejected"} <= set(names):
        raise ValueError(
            f"the dataset has columns {', '.join(names)}, which is not allowed: it must have "
            "chosen and rejected"
        )
    return rows.map(_preference, remove_columns=names, desc="Reading preferences")


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r} is not allowed: it must be text, as chosen is")
        before = [{"role": "user", "content": prompt}]
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    else:
        before = [] if prompt is None or isinstance(prompt, str) else to_messages(prompt)
        left, right = to_messages(chosen), to_messages(rejected)
        if not before:
            before = _common_beginning(left, right)
            left, right = left[len(before) :], right[len(before) :]
        answers = [left, right]
    if not before or not all(answers):
        raise ValueError(
            "chosen and rejected must begin with the same messages, and go on with other answers; "
            f"found {chosen!r} and {rejected!r}"
        )
    # tools as JSON: Arrow would give all of them each other's fields
    found: dict[str, Any] = {"prompt": before, "chosen": answers[0], "rejected": answers[1]}
    tools = _tools(row)
    return {
        **found,
        "tools": json.dumps(tools) if tools else None,
        "chat_template_kwargs": SANITIZED,
    }


def _common_beginning(left: list[Any], right: list[Any]) -> list[Any]:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return left[:count]


# ------------------------------------------------------------------------------------------ GRPO
def grpo_rows(rows: Dataset, prompt_column: str, system: str | None) -> Dataset:
    """The rows with `prompt` as messages; other columns stay, for the reward.

    Raises:
        ValueError: If there is no such column.
    """
    if prompt_column not in rows.column_names:
        raise ValueError(
            f"prompt_column={prompt_column!r} is not allowed: the dataset has "
            f"{', '.join(rows.column_names)}"
        )
    before = [] if system is None else [{"role": "system", "content": system}]

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        found = row[prompt_column]
        is_text = isinstance(found, str)
        asked = [{"role": "user", "content": found}] if is_text else to_messages(found)
        return {"prompt": [*before, *asked] if is_text else asked}

    drop = [] if prompt_column == "prompt" else [prompt_column]
    return rows.map(ask, remove_columns=[*drop, *(["prompt"] if not drop else [])], desc="Asking")


# ---------------------------------------------------------------------------------------- common
def to_messages(found: Any) -> list[dict[str, Any]]:
    """Messages without what Arrow put in for fields that only others have.

    Raises:
        ValueError: If it is no list of objects, or a role of `from` is unknown.
    """
    if not isinstance(found, Sequence) or not all(isinstance(item, Mapping) for item in found):
        raise ValueError(f"{found!r} is not allowed: it must be a list of messages")
    return [_message(without_none(item)) for item in found]


def _message(item: dict[str, Any]) -> dict[str, Any]:
    if "from" not in item:
        return item
    if item["from"] not in ROLES:
        raise ValueError(f"from={item['from']!r} is not allowed: it must be one of {tuple(ROLES)}")
    return {"role": ROLES[item["from"]], "content": item.get("value", "")}


def without_none(value: Any) -> Any:
    """The value without keys, at any depth, whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def _tools(row: Mapping[str, Any]) -> Any:
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else without_none(tools)) or None
