"""The pre-tokenizer pattern and the 256 special tokens of the Kimi Linear tokenizer family.

The ids after the mergeable ranks are laid out at fixed offsets, whatever the vocabulary's size:
`[BOS]` is the number of ranks, `[PAD]` is that number + 255. Offsets without a name are
`<|reserved_token_ID|>` where ID is the absolute id. In the official vocabulary there are 163,584
ranks and 163,840 ids.

Source: the tokenizer of the Kimi K2 / Kimi Linear checkpoints (`tiktoken.model`).
"""

from typing import Final

# The letter classes exclude Han through `&&`, which the regex engines of tiktoken and `tokenizers`
# read alike, code point by code point (the tests compare them).
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

PATTERN_ALTERNATIVES: Final[tuple[str, ...]] = (
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
PATTERN: Final[str] = "|".join(PATTERN_ALTERNATIVES)

NUM_SPECIAL_TOKENS: Final[int] = 256
OFFICIAL_NUM_RANKS: Final[int] = 163_584

BOS_TOKEN: Final[str] = "[BOS]"
BASE_EOS_TOKEN: Final[str] = "[EOS]"
CHAT_EOS_TOKEN: Final[str] = "<|im_end|>"
UNK_TOKEN: Final[str] = "[UNK]"
PAD_TOKEN: Final[str] = "[PAD]"
ASSISTANT_TOKEN: Final[str] = "<|im_assistant|>"
MIDDLE_TOKEN: Final[str] = "<|im_middle|>"
EOS_TOKENS: Final[tuple[str, ...]] = (CHAT_EOS_TOKEN, BASE_EOS_TOKEN)

# Offset from the number of mergeable ranks.
NAMED_OFFSETS: Final[dict[str, int]] = {
    BOS_TOKEN: 0,
    BASE_EOS_TOKEN: 1,
    CHAT_EOS_TOKEN: 2,
    "<|im_user|>": 3,
    ASSISTANT_TOKEN: 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    MIDDLE_TOKEN: 17,
    UNK_TOKEN: 254,
    PAD_TOKEN: 255,
}

# One id each, but kept by `decode(skip_special_tokens=True)`: a parser of tool calls needs them.
NOT_SPECIAL: Final[frozenset[str]] = frozenset(
    {
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    }
)


def special_token_ids(num_ranks: int) -> dict[str, int]:
    """Name all 256 ids that follow the mergeable ranks.

    Args:
        num_ranks: number of mergeable ranks, >= 256 (there is one for every byte).

    Returns:
        Token text to id, in the order of the ids: `num_ranks` to `num_ranks + 255` without a gap.

    Raises:
        ValueError: `num_ranks` is below 256.
    """
    if num_ranks < 256:
        raise ValueError(f"num_ranks is {num_ranks}; allowed: at least 256, one for every byte")
    names = {offset: name for name, offset in NAMED_OFFSETS.items()}
    ids = range(num_ranks, num_ranks + NUM_SPECIAL_TOKENS)
    return {names.get(i - num_ranks, f"<|reserved_token_{i}|>"): i for i in ids}
