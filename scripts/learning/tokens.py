"""What a tokenizer and a model must have in common."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Fields of a new model's configuration that are the tokenizer's."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def check_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raise ValueError if the tokenizer has more ids than the model of this name."""
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} ids, which is not allowed: {name} has "
            f"{model.config.vocab_size}"
        )
