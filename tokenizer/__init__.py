"""The tokenizer: special tokens, tiktoken files, conversion, training, chat and its answers."""

from kimi_linear.tokenizer.answers import (
    Answer,
    AnswerReader,
    ToolCall,
    parse_answer,
    response_template,
)
from kimi_linear.tokenizer.chat import (
    assistant_tokens_mask,
    chat_template,
    encode_chat,
    encode_plain,
)
from kimi_linear.tokenizer.convert import build_tokenizer, convert_tiktoken, recover_merges
from kimi_linear.tokenizer.snapshot import convert_snapshot, ranks_of, save_tokenizer
from kimi_linear.tokenizer.special_tokens import NUM_SPECIAL_TOKENS, PATTERN, special_token_ids
from kimi_linear.tokenizer.streaming import StreamDecoder
from kimi_linear.tokenizer.text import MAX_RUN, check_text
from kimi_linear.tokenizer.tiktoken_format import load_tiktoken, save_tiktoken
from kimi_linear.tokenizer.train import train_bpe

__all__ = [
    "MAX_RUN",
    "NUM_SPECIAL_TOKENS",
    "PATTERN",
    "Answer",
    "AnswerReader",
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
    "response_template",
    "save_tiktoken",
    "save_tokenizer",
    "special_token_ids",
    "train_bpe",
]
