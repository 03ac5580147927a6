"""Bits per byte of a language model on whole texts.

Every token of a text is predicted, the first from the begin token, and so is the end token: the sum
is the length of a complete code for the text, which compressors can be held against. A text longer
than a window is read in windows that overlap, and each token is scored once, in the window that
shows most of what stands before it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

WINDOW, OVERLAP = 2048, 512
BATCH_TOKENS = 8192
IGNORED = -100


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text and its end token; names of special tokens in a text are plain text.

    Args:
        tokenizer: It must have an end token.
        texts: Any texts; none may be missing.

    Returns:
        As many lists of ids.

    Raises:
        ValueError: If the tokenizer lacks an end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer has eos_token_id=None; allowed: a tokenizer with an end token")
    if not texts:
        return []
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return [[*ids, end] for ids in tokenizer(list(texts), **plain)["input_ids"]]


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    num_bytes: int,
    begin_id: int,
    *,
    window: int = WINDOW,
    overlap: int = OVERLAP,
    batch_tokens: int = BATCH_TOKENS,
) -> float:
    """Bits that all sequences take together, divided by the bytes of the texts they stand for.

    Args:
        model: A causal language model; it is in eval mode meanwhile.
        sequences: Token ids of the texts, each with its end token and without the begin token.
        num_bytes: UTF-8 bytes of the texts.
        begin_id: Token that stands before each sequence.
        window: Most tokens that the model sees at once.
        overlap: Tokens of a window that are context only, in all windows but a text's first.
        batch_tokens: Most tokens of one call; no effect on the result but rounding.

    Returns:
        Sum of -log2 p over all tokens, divided by `num_bytes`.

    Raises:
        ValueError: If `num_bytes` is not positive or `overlap` not below `window`.
    """
    if num_bytes <= 0:
        raise ValueError(f"num_bytes={num_bytes} is not allowed: it must be above 0")
    pieces = [piece for ids in sequences for piece in windows([begin_id, *ids], window, overlap)]
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    nats = 0.0
    try:
        for inputs, targets in filled_batches(pieces, batch_tokens):
            logits = model(input_ids=inputs.to(device), use_cache=False).logits
            nats += _nats(logits, targets.to(device))
    finally:
        model.train(was_training)
    return nats / math.log(2) / num_bytes


def windows(
    ids: Sequence[int], window: int = WINDOW, overlap: int = OVERLAP
) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a sequence into overlapping windows.

    Args:
        ids: The begin token and what follows it.
        window: Most tokens of one window.
        overlap: Tokens that a window shares with the one before.

    Yields:
        Inputs and the token to predict after each; -100 where an earlier window predicts it.

    Raises:
        ValueError: If `overlap` is not from 0 to `window` - 1.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap={overlap} is not allowed: it must be from 0 to {window - 1}")
    count = len(ids) - 1
    for start in range(0, max(1, count - overlap), window - overlap):
        end = min(start + window, count)
        known = overlap if start else 0
        yield list(ids[start:end]), [IGNORED] * known + list(ids[start + known + 1 : end + 1])


def filled_batches(
    pieces: Iterable[tuple[list[int], list[int]]], batch_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets [B, T], of `windows` about as long as each other, filled up on the right.

    What is filled in stands after everything that is scored, so that a causal model never reads it.
    """
    batch: list[tuple[list[int], list[int]]] = []
    for piece in sorted(pieces, key=lambda piece: len(piece[0])):
        if batch and (len(batch) + 1) * len(piece[0]) > batch_tokens:
            yield _fill_up(batch)
            batch = []
        batch.append(piece)
    if batch:
        yield _fill_up(batch)


def _fill_up(batch: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(inputs) for inputs, _ in batch)
    inputs = torch.zeros(len(batch), length, dtype=torch.int64)
    targets = torch.full((len(batch), length), IGNORED)
    for row, (given, wanted) in enumerate(batch):
        inputs[row, : len(given)] = torch.tensor(given)
        targets[row, : len(wanted)] = torch.tensor(wanted)
    return inputs, targets


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -ln p of `targets` [B, T] under `logits` [B, T, vocabulary]."""
    flat = logits.flatten(0, 1).float()
    return float(F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum"))
