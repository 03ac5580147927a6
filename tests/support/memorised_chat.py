"""A tiny chat model that knows a few conversations by heart.

What it answers is known to the letter, so that whatever talks to it, over whatever interface, can
be held to the exact text. Greedy decoding gives the answers of `CONVERSATIONS`, token for token.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from builders import TWO_LAYERS, tiny_config
from generating.calculator import calculator
from learning.optimizers import make_optimizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.tokenizer import convert_tiktoken, encode_chat, parse_answer, train_bpe

Message = dict[str, Any]

VOCAB_SIZE = 600
MAX_STEPS = 600
LEARNING_RATE = 1e-2
# Every answer's every token must have this probability: far enough from any other choice for
# another class, dtype or order of sums to choose the same.
LEAST_PROBABILITY = 0.99

CALCULATOR_SCHEMA: dict[str, Any] = get_json_schema(calculator)
TOOLS: list[dict[str, Any]] = [CALCULATOR_SCHEMA]

GREETING: list[Message] = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi! 你好 👋"},
    {"role": "user", "content": "And in French?"},
    {"role": "assistant", "content": "Bonjour, ça va ? 🥐"},
]
WITH_SYSTEM_PROMPT: list[Message] = [
    {"role": "system", "content": "Answer as a pirate."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Ahoy, matey! ☠️"},
]
CALCULATION: list[Message] = [
    {"role": "user", "content": "What is 6 * 7?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "functions.calculator:0",
                "function": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "functions.calculator:0", "content": "42"},
    {"role": "assistant", "content": "6 * 7 is 42."},
]
COUNTING: list[Message] = [
    {"role": "user", "content": "Count to forty"},
    {"role": "assistant", "content": ", ".join(str(number) for number in range(1, 41))},
]

# Each with the tools that are declared in it.
CONVERSATIONS: dict[str, tuple[list[Message], list[dict[str, Any]] | None]] = {
    "greeting": (GREETING, None),
    "system prompt": (WITH_SYSTEM_PROMPT, None),
    "calculation": (CALCULATION, TOOLS),
    "counting": (COUNTING, None),
}


def make_chat_model(folder: Path) -> None:
    """Write the model and its tokenizer, after checking that it knows every answer.

    Args:
        folder: Where to; created if need be. `from_pretrained` with `trust_remote_code=True` and
            `AutoTokenizer` load it.
    """
    tokenizer = _make_tokenizer(folder)
    model = _make_model(tokenizer)
    with _one_thread():
        _memorise(model, [_encode(tokenizer, *pair) for pair in CONVERSATIONS.values()])
        for messages, tools in CONVERSATIONS.values():
            for before, answer in _answers(messages):
                assert _generate(model, tokenizer, before, tools) == answer
    model.save_pretrained(folder)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors as small as these lose more by waiting for other threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A vocabulary of the words of the conversations."""
    words = [str(CONVERSATIONS).replace("'", '"')]
    ranks = train_bpe(words, VOCAB_SIZE, show_progress=False)
    return convert_tiktoken(ranks, folder, model_max_length=4096)


def _make_model(tokenizer: PreTrainedTokenizerBase) -> KimiLinearForCausalLM:
    """Two layers, one of either kind of attention, the second with experts."""
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=len(tokenizer),
        hidden_size=56,
        **TWO_LAYERS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = KimiLinearForCausalLM(config)
    model.generation_config.do_sample = False
    return model


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[dict[str, Any]] | None
) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and the same as labels, -100 where others than the model speak."""
    encoded = encode_chat(tokenizer, messages, tools=tools, return_assistant_tokens_mask=True)
    ids, masks = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if mask else -100 for token, mask in zip(ids, masks, strict=True)]


def _memorise(model: KimiLinearForCausalLM, encoded: list[tuple[list[int], list[int]]]) -> None:
    """Train on all conversations, packed into one row, until each answer is all but certain."""
    ids = torch.tensor([[token for row, _ in encoded for token in row]])
    labels = torch.tensor([[label for _, row in encoded for label in row]])
    positions = torch.tensor([[position for row, _ in encoded for position in range(len(row))]])
    wanted, targets = labels[:, 1:] != -100, labels[:, 1:][labels[:, 1:] != -100]
    optimizer = make_optimizer("adamw", model, LEARNING_RATE, 0.0)
    model.train()
    for _ in range(MAX_STEPS):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits[wanted], targets, reduction="none")
        if losses.max().neg().exp() > LEAST_PROBABILITY:
            break
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise AssertionError(f"not memorised in {MAX_STEPS} steps: loss {losses.max():.3f}")
    model.eval()


def _answers(messages: list[Message]) -> Iterator[tuple[list[Message], Message]]:
    """Every answer in a conversation, with what is said before it."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            yield copy.deepcopy(messages[:index]), message


def _generate(
    model: KimiLinearForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
) -> Message:
    """The model's answer, as a message."""
    inputs = encode_chat(
        tokenizer, messages, tools=tools, add_generation_prompt=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    return parse_answer(tokenizer, ids[0, inputs["input_ids"].shape[1] :].tolist()).message()
