"""The chat model of the tests, loaded as any other."""

from pathlib import Path

import pytest
import torch
from memorised_chat import CONVERSATIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_by_heart(chat_model: Path, name: str) -> None:
    """Through nothing but Transformers' own interfaces, every turn of every conversation."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    messages, tools = CONVERSATIONS[name]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        inputs = tokenizer.apply_chat_template(
            messages[:index], tools=tools, add_generation_prompt=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=200)[0]
        text = tokenizer.apply_chat_template(messages[: index + 1], tools=tools, tokenize=False)
        assert tokenizer.decode(ids) == text
