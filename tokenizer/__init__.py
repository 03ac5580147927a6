"""The tokenizer: special tokens, tiktoken files, conversion, training, chat and its answers."""

from .answers import RESPONSE_TEMPLATE, Answer, ToolCall, parse_answer
from .chat import assistant_tokens_mask, chat_template, encode_chat, encode_plain
from .convert import build_tokenizer, convert_tiktoken, recover_merges
from .snapshot import convert_snapshot, ranks_of, save_tokenizer
from .special_tokens import NUM_SPECIAL_TOKENS, PATTERN, special_token_ids
from .streaming import StreamDecoder
from .text import MAX_RUN, check_text
from .tiktoken_format import load_tiktoken, save_tiktoken
from .train import train_bpe

__all__ = [
    "MAX_RUN",
    "NUM_SPECIAL_TOKENS",
    "PATTERN",
    "RESPONSE_TEMPLATE",
    "Answer",
    "StreamDecoder",
    "ToolCall",
    "assistant_tokens_mask",
    "build_tokenizer",
    "chat_template",
    "check_text",
    "convert_snapshot",
    "convert_tiktoken",
    "encode_chat",
    "encode_plain",
    "load_tiktoken",
    "parse_answer",
    "ranks_of",
    "recover_merges",
    "save_tiktoken",
    "save_tokenizer",
    "special_token_ids",
    "train_bpe",
]
