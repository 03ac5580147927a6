"""Small runs of scripts/finetune.py: a model that can add, texts for it, settings, its logs."""

import json
from pathlib import Path
from typing import Any

import torch
from builders import TWO_LAYERS, tiny_config

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.tokenizer import convert_tiktoken, train_bpe

SUMS = [(left, right) for left in range(6) for right in range(4)]
# Sizes that the presets of `KimiLinearQuantizationConfig` take: inputs are multiples of 128.
PACKABLE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "linear_attn_config": {**TWO_LAYERS["linear_attn_config"], "num_heads": 8},
}
REWARD = """
def low(completion_ids, answer, completions, **columns):
    assert len(answer) == len(completions) and completions[0][0]["role"] == "assistant"
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]
"""


def question(left: int, right: int) -> str:
    return f"What is {left} plus {right}?"


def write_model(folder: Path, **fields: Any) -> Path:
    """The folder, with a model of two layers, one of either attention, and its tokenizer."""
    texts = [f"{question(*pair)} It is {sum(pair)}. I do not know." for pair in SUMS]
    tokenizer = convert_tiktoken(
        train_bpe(texts, 530, show_progress=False), folder, model_max_length=4096
    )
    torch.manual_seed(0)
    config = tiny_config(
        **{
            **TWO_LAYERS,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **fields,
        }
    )
    KimiLinearForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """The folder, with a file of conversations, one of preferences, and one of questions."""
    files: dict[str, list[Any]] = {"chat": [], "preferences": [], "questions": []}
    for left, right in SUMS:
        asked, total = question(left, right), left + right
        answers = [
            [{"role": "assistant", "content": text}]
            for text in (f"It is {total}.", "I do not know.")
        ]
        prompt = [{"role": "user", "content": asked}]
        files["chat"].append({"messages": [*prompt, *answers[0]]})
        files["preferences"].append(
            {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        )
        files["questions"].append({"question": asked, "answer": f"{left} + {right} #### {total}"})
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def options(start: Path, file: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "model": str(start),
        "dataset": str(file),
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 100,
        "threads": 1,
    }
    return {**common, **changes}


def logged(folder: Path, *without: str) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` that stand for a step, but for what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if "time" not in name and name not in without}
        for line in lines
        if "loss" in line
    ]


def grpo_options(start: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "reward.py").write_text(REWARD)
    common = {
        "reward": [f"{folder / 'reward.py'}:low"],
        "prompt_column": "question",
        "batch_size": 16,
        "num_generations": 8,
        "max_new_tokens": 8,
        "schedule": "constant",
        "warmup": 0.0,
    }
    return options(start, data / "questions.jsonl", **{**common, **changes})
