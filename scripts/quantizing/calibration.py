"""The text that a model reads while it is quantised, as rows of tokens."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learning.rows import pack
from options.settings import require
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.tokenizer import convert_snapshot, encode_chat, encode_plain
from kimi_linear.tokenizer.convert import VOCAB_FILE

ROW_TOKENS = 2048
# No text has fewer characters a token, but for scripts whose characters are several tokens.
CHARS_PER_TOKEN = 8


@dataclass(frozen=True)
class Calibration:
    """Rows that a model reads.

    Attributes:
        ids: [B, T] int64.
        positions: [B, T] int64, which restart with every text: none sees another.
        settings: What the rows are known by again.
    """

    ids: Tensor
    positions: Tensor
    settings: dict[str, Any]


def read_calibration(
    file: Path, snapshot: Path, config: KimiLinearConfig, num_tokens: int
) -> Calibration:
    """Read a file's first tokens.

    Args:
        file: JSON lines with `text` or `messages` if its name ends in .jsonl, else text.
        snapshot: Folder with the tokenizer.
        config: The model's.
        num_tokens: How many to read; fewer if the file has no more.

    Returns:
        Rows of 2,048 tokens, texts laid end to end; a single shorter one of a short file.

    Raises:
        ValueError: The file is missing, has no text, or lines of another form.
    """
    require(num_tokens >= 2, "calibration_tokens", num_tokens, "at least 2")
    if not file.is_file():
        raise ValueError(f"--calibrate {file} is not there; allowed: a file of text or JSON lines")
    tokenizer = _tokenizer(snapshot)
    length = min(ROW_TOKENS, num_tokens)
    rows: list[dict[str, list[int]]] = []
    try:
        for row in pack(_sequences(file, tokenizer, num_tokens), length, keep_rest=True):
            if len(row["input_ids"]) == length or not rows:
                rows.append(row)
            if len(rows) * length >= num_tokens:
                break
    except UnicodeDecodeError as error:
        raise ValueError(f"--calibrate {file} is not UTF-8 text ({error})") from error
    if not rows:
        raise ValueError(f"--calibrate {file} has no text of two tokens or more")
    ids, positions = (
        torch.tensor([row[key] for row in rows]) for key in ("input_ids", "position_ids")
    )
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"{snapshot}: the tokenizer gives id {int(ids.max())}; allowed: below vocab_size="
            f"{config.vocab_size}"
        )
    if ids.numel() < num_tokens:
        print(f"{file} has {ids.numel():,} tokens, of {num_tokens:,} that were asked for")
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return Calibration(ids, positions, {"tokens": list(ids.shape), "sha256": digest})


def _tokenizer(snapshot: Path) -> PreTrainedTokenizerBase:
    """The snapshot's own; none of its code runs."""
    if (snapshot / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(snapshot, trust_remote_code=False)
    if not (snapshot / VOCAB_FILE).is_file():
        raise ValueError(
            f"{snapshot} has neither tokenizer.json nor {VOCAB_FILE}; --calibrate needs one"
        )
    with tempfile.TemporaryDirectory() as folder:
        return convert_snapshot(snapshot, folder)


def _sequences(
    file: Path, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> Iterator[list[int]]:
    """Token ids of the file's texts, each after a begin token if there is one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as lines:
            for number, row in _rows(file, lines):
                yield _ids(file, number, row, tokenizer, begin)
        return
    with open(file, encoding="utf-8") as text:
        yield begin + encode_plain(tokenizer, [text.read(num_tokens * CHARS_PER_TOKEN)])[0]


def _rows(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number} holds no object; allowed: one a line")
        yield number, row


def _ids(
    file: Path,
    number: int,
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    begin: list[int],
) -> list[int]:
    if "messages" in row:
        return list(encode_chat(tokenizer, row["messages"], tools=row.get("tools"))["input_ids"])
    if not isinstance(row.get("text"), str):
        raise ValueError(
            f"{file}, line {number} has the fields {', '.join(row)}; allowed: one with `text`, a "
            "string, or `messages`"
        )
    return begin + encode_plain(tokenizer, [row["text"]])[0]
