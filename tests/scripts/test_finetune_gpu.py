"""scripts/finetune.py on a GPU: each recipe in bfloat16, adapters over 3, 4 and 8 bits."""

import json
from pathlib import Path
from typing import Any

import finetune
import pytest
import torch
from finetune_runs import PACKABLE, grpo_options, logged, options, write_data, write_model
from transformers import AutoTokenizer

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.configuration_quantization import PRESETS

pytest.importorskip("trl", reason="fine-tuning needs TRL: pip install '.[finetune]'")
peft = pytest.importorskip("peft", reason="fine-tuning needs PEFT: pip install '.[finetune]'")

pytestmark = pytest.mark.gpu
# sizes that the decode graph and grouped products take
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch):
    """TRL refuses a process that sees several."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("start") / "model", **SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def answer(folder: Path) -> str:
    """What the model says in bfloat16, decoded as one graph."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    model.decode_backend = "graph"
    messages = [{"role": "user", "content": "What is 2 plus 2?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = getattr(ids, "input_ids", ids).cuda()
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_learns_to_answer(start: Path, data: Path, tmp_path: Path, checkpointing: bool) -> None:
    """And the model that it leaves answers as it has learnt."""
    settings = options(start, data / "chat.jsonl", steps=40, eval_percent=10, bf16=True)
    settings["gradient_checkpointing"] = checkpointing
    finetune.main("sft", output=str(tmp_path / "run"), **settings)
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert losses[-1] < 0.3 * losses[0], losses
    assert answer(tmp_path / "run").startswith("It is ")


def test_sft_goes_on_where_it_was(start: Path, data: Path, tmp_path: Path) -> None:
    """Kernels add in a fixed order, so nearly to the bit."""
    settings = options(start, data / "chat.jsonl", steps=8, save_every=4, bf16=True)
    finetune.main("sft", output=str(tmp_path / "run"), **settings)
    whole = logged(tmp_path / "run")
    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "again" / "checkpoint-4")
    finetune.main("sft", output=str(tmp_path / "again"), resume=True, **settings)
    again = logged(tmp_path / "again")
    assert [line["loss"] for line in again] == pytest.approx(
        [line["loss"] for line in whole], rel=1e-3
    )


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit", "24gb", "48gb"])
def test_adapters_of_every_part_and_the_two_merged(
    start: Path, data: Path, tmp_path: Path, quantize: str | None
) -> None:
    if quantize in PRESETS:
        start = write_model(tmp_path / "model", **PACKABLE)
    elif quantize:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[qlora]'")
    folder = tmp_path / "run"
    lora = {"lora": ["all"], "lora_rank": 4, "quantize": quantize, "merge": True, "bf16": True}
    settings = options(start, data / "chat.jsonl", steps=12, **lora)
    finetune.main("sft", output=str(folder), **settings)
    losses = [line["loss"] for line in logged(folder)]
    assert losses[-1] < losses[0] - 0.5, losses
    merged = KimiLinearForCausalLM.from_pretrained(folder / "merged")
    assert merged.dtype == torch.bfloat16
    base = KimiLinearForCausalLM.from_pretrained(start)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    wanted = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    changed = 0
    for name, weight in merged.float().state_dict().items():
        error, size = (weight - wanted[name]).norm(), wanted[name].norm()
        assert error <= 2**-7 * size, (name, error, size)
        changed += bool((wanted[name] - before[name]).norm() > 0.02 * size)
    assert changed > 15


@pytest.mark.parametrize("lora", [[], ["attention", "experts"]])
def test_dpo_prefers_what_was_chosen(
    start: Path, data: Path, tmp_path: Path, lora: list[str]
) -> None:
    folder = tmp_path / "run"
    settings = options(start, data / "preferences.jsonl", lora=lora, lora_rank=2, steps=8)
    finetune.main("dpo", output=str(folder), **settings, eval_percent=20, bf16=True)
    lines = logged(folder)
    # the reference is the model before the first step, whose rate is 0
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-2)
    measured = json.loads((folder / "eval_results.json").read_text())
    assert measured["eval_rewards/accuracies"] == 1 and measured["eval_loss"] < 0.6


def test_grpo_raises_a_reward(start: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = grpo_options(start, data, tmp_path, steps=20, learning_rate=3e-2, bf16=True)
    finetune.main("grpo", output=str(folder), **settings)
    rewards = [line["reward"] for line in logged(folder)]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6, rewards
