"""TRL's GRPO with rollouts by `generate_batch()`: they are of the model that is trained, and a
reward rises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decode_models import DEVICES, small_grids  # noqa: F401
from finetune_runs import question, write_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from kimi_linear import KimiLinearForCausalLM, lora_targets
from kimi_linear.generation.requests import OwnCaches, PooledTexts, RequestProcessor

trl = pytest.importorskip("trl", reason="needs TRL: pip install '.[finetune]'")
peft = pytest.importorskip("peft", reason="needs PEFT: pip install '.[finetune]'")
datasets = pytest.importorskip("datasets", reason="needs TRL: pip install '.[finetune]'")

pytestmark = pytest.mark.finetune
# sizes that recorded steps take
SIZES: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_attention_heads": 3,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("start") / "model", **SIZES)


def low(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Tokens of the lower part of the vocabulary are good."""
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def make_trainer(
    start: Path, folder: Path, reward: Any, *, device: str = "cpu", lora: Any = (), **settings: Any
) -> Any:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = KimiLinearForCausalLM.from_pretrained(start, dtype=dtype)
    options = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"page_size": 32, "num_blocks": 60},
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "seed": 0,
    }
    texts = [" ".join([question(i, 2)] * (1 + i % 3)) for i in range(12)]
    adapters = None
    if lora:
        targets = lora_targets(model.config, *lora)
        adapters = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **targets)
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(folder), **{**options, **settings}),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}]} for text in texts]
        ),
        processing_class=AutoTokenizer.from_pretrained(start),
        peft_config=adapters,
    )


@torch.no_grad()
def log_probabilities(model: Any, outs: list[Any]) -> list[torch.Tensor]:
    """Of each answer's tokens, by a forward pass of all texts, padded on the left as TRL does."""
    texts = [torch.tensor(out.prompt_ids + out.generated_tokens) for out in outs]
    ids = pad_sequence(texts, batch_first=True, padding_value=-1, padding_side="left")
    ids = ids.to(model.device)
    out = model(ids.clamp(min=0), attention_mask=(ids >= 0).long(), use_cache=False)
    scores = out.logits.float().log_softmax(dim=-1)[:, :-1]
    found = scores.gather(2, ids[:, 1:, None].clamp(min=0))[..., 0].cpu()
    return [row[-len(out.generated_tokens) :] for row, out in zip(found, outs, strict=True)]


def log_ratios(start: Path, folder: Path, monkeypatch: Any, **settings: Any) -> tuple[Any, Any]:
    """Of three steps: log-probabilities of the rollouts' tokens less those of the model that is
    trained on them, of each answer; and where the texts were."""
    rollouts, places, ratios = [], [], []
    generate, make = KimiLinearForCausalLM.generate_batch, KimiLinearForCausalLM.request_processor

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        rollouts.append(generate(self, *args, **kwargs))
        return rollouts[-1]

    def processor(self: Any, manager: Any) -> RequestProcessor:
        made = make(self, manager)
        places.append(type(made.texts))
        return made

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """TRL calls it between the rollouts and the step."""
        outs = list(rollouts[-1].values())
        assert [out.generated_tokens for out in outs] == completion_ids
        for out, expected in zip(outs, log_probabilities(trainer.model, outs), strict=True):
            ratios.append(torch.tensor(out.logprobs) - expected)
        return low(completion_ids)

    monkeypatch.setattr(KimiLinearForCausalLM, "generate_batch", noted)
    monkeypatch.setattr(KimiLinearForCausalLM, "request_processor", processor)
    batching = {"page_size": 32, "num_blocks": 60, "return_logprobs": True}
    settings["transformers_continuous_batching_config"] = batching
    trainer = make_trainer(start, folder, reward, max_steps=3, max_completion_length=6, **settings)
    before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    trainer.train()
    assert len(rollouts) == 3 and len(ratios) == 12
    trained = {name: x for name, x in trainer.model.named_parameters() if x.requires_grad}
    changed = [name for name, x in trained.items() if not torch.equal(x, before[name])]
    assert len(changed) > len(trained) / 2
    return ratios, set(places)


@pytest.mark.parametrize("lora", [(), ("all",)])
def test_rollouts_are_of_the_model_that_is_trained(
    start: Path, tmp_path: Path, monkeypatch: Any, lora: tuple[str, ...]
) -> None:
    """With adapters, beside the model without them, and with checkpointing."""
    more = {"beta": 0.1, "gradient_checkpointing": True} if lora else {}
    ratios, places = log_ratios(start, tmp_path, monkeypatch, lora=lora, **more)
    assert max(ratio.abs().max() for ratio in ratios) < 1e-4
    assert places == {OwnCaches}


@pytest.mark.kernels
@pytest.mark.interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("small_grids")
def test_recorded_steps_are_of_the_model_that_is_trained(
    start: Path, tmp_path: Path, monkeypatch: Any, device: str
) -> None:
    """They read weights where they lay when they were recorded; training changes them there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(device == "cuda"))
    ratios, places = log_ratios(start, tmp_path, monkeypatch, device=device)
    errors = torch.cat(ratios).abs()
    assert errors.max() < 1e-4 if device == "cpu" else errors.mean() < 0.05
    assert places == {PooledTexts}


def test_a_reward_rises(start: Path, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8, "num_generations": 8, "learning_rate": 5e-2}
    trainer = make_trainer(start, tmp_path, low, max_steps=10, max_completion_length=3, **settings)
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6, rewards
