"""A downloaded snapshot's tokenizer, and `tiktoken.model` kept where a tokenizer is saved."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_linear.tokenizer.byte_level import chars_to_bytes
from kimi_linear.tokenizer.convert import VOCAB_FILE, convert_tiktoken, replacing_files
from kimi_linear.tokenizer.special_tokens import (
    CHAT_EOS_TOKEN,
    EOS_TOKENS,
    NUM_SPECIAL_TOKENS,
    special_token_ids,
)
from kimi_linear.tokenizer.tiktoken_format import load_tiktoken, save_tiktoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

DEFAULT_MAX_LENGTH = 1_048_576


def convert_snapshot(
    snapshot: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    eos_token: str | None = None,
) -> "PreTrainedTokenizerFast":
    """Convert the tokenizer of a downloaded model.

    Args:
        snapshot: Folder with `tiktoken.model`. Its `config.json` and `tokenizer_config.json`, where
            there are any, must describe the same tokenizer.
        output_dir: Folder to write into; it may be `snapshot`. Links are replaced by files, never
            written through.
        eos_token: What ends an answer; None: as the snapshot says, else `<|im_end|>`.

    Returns:
        The tokenizer, loaded from the folder.

    Raises:
        ValueError: `tiktoken.model` is missing, malformed or of another size than `config.json`
            says, or `tokenizer_config.json` has other special tokens than this family.
    """
    folder = Path(snapshot)
    vocabulary = folder / VOCAB_FILE
    if not vocabulary.is_file():
        raise ValueError(f"{vocabulary} is missing; allowed: a folder with {VOCAB_FILE}")
    config, settings = (
        read_json(folder / name) for name in ("config.json", "tokenizer_config.json")
    )
    num_ranks = len(load_tiktoken(vocabulary))
    _check_vocab_size(config, num_ranks, folder)
    _check_special_tokens(settings, num_ranks, folder)
    return convert_tiktoken(
        vocabulary,
        output_dir,
        eos_token=eos_token or _eos_token(config, settings, folder, num_ranks),
        model_max_length=_max_length(config, settings),
    )


def save_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", output_dir: str | os.PathLike[str]
) -> None:
    """Save a tokenizer, and `tiktoken.model` beside it if it is one of this family.

    `save_pretrained` alone writes what Transformers reads, and no `tiktoken.model`.

    Args:
        tokenizer: Any tokenizer.
        output_dir: The folder to write into. Links are replaced by files, never written through.
    """
    with replacing_files(Path(output_dir)) as folder:
        tokenizer.save_pretrained(folder)
        ranks = ranks_of(tokenizer)
        if ranks is not None:
            save_tiktoken(ranks, folder / VOCAB_FILE)


def ranks_of(tokenizer: "PreTrainedTokenizerBase") -> dict[bytes, int] | None:
    """The mergeable ranks of a loaded tokenizer.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        Token bytes to rank; None if it is no fast byte-level BPE with this family's special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    vocab = backend.get_vocab(with_added_tokens=False)
    to_byte = chars_to_bytes()
    if len(vocab) < 256 or special_token_ids(len(vocab)).items() - tokenizer.get_vocab().items():
        return None
    if any(char not in to_byte for token in vocab for char in token):
        return None
    return {bytes(to_byte[char] for char in token): rank for token, rank in vocab.items()}


def _check_vocab_size(config: dict[str, Any], num_ranks: int, folder: Path) -> None:
    """Compare the model's vocabulary size with the file's; nothing without a config."""
    size = num_ranks + NUM_SPECIAL_TOKENS
    if config and config.get("vocab_size") != size:
        raise ValueError(
            f"{folder / VOCAB_FILE} gives {size} ids; allowed: vocab_size of "
            f"{folder / 'config.json'}, which is {config.get('vocab_size')!r}"
        )


def _check_special_tokens(settings: dict[str, Any], num_ranks: int, folder: Path) -> None:
    """Compare the special tokens that a `tokenizer_config.json` lists with ours, id by id."""
    names = {str(token_id): name for name, token_id in special_token_ids(num_ranks).items()}
    listed = settings.get("added_tokens_decoder") or {}
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    if not isinstance(listed, dict):
        raise ValueError(f"{where} is of type {type(listed).__name__}; allowed: an object")
    for key, token in listed.items():
        expected = names.get(key)
        found = token.get("content") if isinstance(token, dict) else token
        if found != expected or expected is None:
            last = num_ranks + NUM_SPECIAL_TOKENS - 1
            allowed = f"ids from {num_ranks} to {last}" if expected is None else repr(expected)
            raise ValueError(f"{where}[{key!r}] is {found!r}; allowed: {allowed}")


def _eos_token(
    config: dict[str, Any], settings: dict[str, Any], folder: Path, num_ranks: int
) -> str:
    """What ends an answer: as generation says, then the model, then the tokenizer."""
    names = special_token_ids(num_ranks)
    for fields in (read_json(folder / "generation_config.json"), config):
        found = fields.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        for token in EOS_TOKENS:
            if names[token] in ids:
                return token
    named = settings.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    return named if named in EOS_TOKENS else CHAT_EOS_TOKEN


def _max_length(config: dict[str, Any], settings: dict[str, Any]) -> int:
    """The context length; tokenizers that know none say 1e30."""
    for fields in (config, settings):
        length = fields.get("model_max_length")
        if isinstance(length, int) and 0 < length < 10**9:
            return length
    return DEFAULT_MAX_LENGTH


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; allowed: an object")
    return value
