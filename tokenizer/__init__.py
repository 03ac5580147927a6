"""The tokenizer: special tokens, tiktoken files, conversion, training, streaming."""

from .convert import build_tokenizer, convert_tiktoken
from .special_tokens import NUM_SPECIAL_TOKENS, PATTERN, special_token_ids
from .streaming import StreamDecoder
from .text import MAX_RUN, check_text
from .tiktoken_format import load_tiktoken, save_tiktoken
from .train import train_bpe

__all__ = [
    "MAX_RUN",
    "NUM_SPECIAL_TOKENS",
    "PATTERN",
    "StreamDecoder",
    "build_tokenizer",
    "check_text",
    "convert_tiktoken",
    "load_tiktoken",
    "save_tiktoken",
    "special_token_ids",
    "train_bpe",
]
