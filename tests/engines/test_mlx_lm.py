"""mlx-lm reads our folders and computes the same, and what is said of the rest. The first test is
in CI."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import FIELDS, LINEAR, small_config, write_engine_model
from transformers import AutoTokenizer

from kimi_linear import KimiLinearForCausalLM, engine_problems

# In float32.
ALLOWED = 1e-3
RIGHT: dict[str, dict[str, Any]] = {
    **FIELDS,
    "renormalize": {"moe_renormalize": False},
    "one expert": {"num_experts_per_token": 1},
    "no shared expert": {"num_shared_experts": 0},
    "shared experts unset": {"num_shared_experts": None},
    "every second": {"moe_layer_freq": 2},
    "tied": {"tie_word_embeddings": True},
    "more KDA heads": {"num_attention_heads": 2},
}
SILENT: dict[str, dict[str, Any]] = {
    "activation": {"hidden_act": "gelu"},
    "groups, biases below 0": {"num_expert_group": 4, "topk_group": 1, "shift": -2.0},
}
REFUSED: dict[str, dict[str, Any]] = {
    "query rank": {"q_lora_rank": 32},
    "only KDA": {"linear_attn_config": {**LINEAR, "full_attn_layers": []}},
    "only MLA": {"linear_attn_config": {**LINEAR, "kda_layers": []}},
}
Report = Callable[[str], None]


@pytest.fixture(autouse=True)
def utils(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mlx-lm's loader; it lowers the process's limit of open files when it is imported."""
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    mlx = pytest.importorskip("mlx.core", exc_type=ImportError)
    mlx.set_default_device(mlx.cpu)
    return pytest.importorskip("mlx_lm.utils", exc_type=ImportError)


def differences(folder: Path, utils: Any) -> dict[str, float]:
    """Errors of logits over their spread: of a text at once, and token by token."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    ids = torch.arange(1, 41)[None] * 7 % 500 + 3
    with torch.no_grad():
        wanted = KimiLinearForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits[0]
    model, _ = utils.load_model(folder)
    tokens = mx.array(ids.numpy())
    cache = make_prompt_cache(model)
    pieces = [model(tokens[:, :20], cache=cache)[0]]
    pieces += [model(tokens[:, i : i + 1], cache=cache)[0] for i in range(20, ids.shape[1])]
    found = {"at once": model(tokens)[0], "20 at once, then 1 a call": mx.concatenate(pieces)}
    spread = wanted.std()
    return {
        how: float((torch.from_numpy(np.array(logits)) - wanted).square().mean().sqrt() / spread)
        for how, logits in found.items()
    }


def said(ratios: dict[str, float]) -> str:
    return ", ".join(f"{ratio:.1e} {how}" for how, ratio in ratios.items())


@pytest.mark.transformers
def test_a_folder_is_read(tmp_path: Path, utils: Any) -> None:
    folder = write_engine_model(tmp_path / "model")
    assert max(differences(folder, utils).values()) < ALLOWED
    tokenizer = utils.load_tokenizer(folder)
    own = AutoTokenizer.from_pretrained(folder)
    text = "def f(x): return 'naïve'  # 中文"
    assert tokenizer.encode(text) == own(text).input_ids
    assert tokenizer.has_tool_calling
    assert tokenizer.detokenizer is not None


@pytest.mark.engines
@pytest.mark.parametrize("name", RIGHT)
def test_logits(name: str, tmp_path: Path, utils: Any, report: Report) -> None:
    ratios = differences(write_engine_model(tmp_path / "model", **RIGHT[name]), utils)
    report(said(ratios))
    assert max(ratios.values()) < ALLOWED
    assert engine_problems(small_config(**RIGHT[name]), "mlx-lm") == []


@pytest.mark.engines
@pytest.mark.parametrize("name", SILENT)
def test_what_is_wrong_without_an_error(
    name: str, tmp_path: Path, utils: Any, report: Report
) -> None:
    ratios = differences(write_engine_model(tmp_path / "model", **SILENT[name]), utils)
    report(said(ratios))
    assert min(ratios.values()) > 0.05
    fields = {key: value for key, value in SILENT[name].items() if key != "shift"}
    problems = engine_problems(small_config(**fields), "mlx-lm")
    assert any(problem.is_silent for problem in problems)


@pytest.mark.engines
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path, utils: Any, report: Report) -> None:
    folder = write_engine_model(tmp_path / "model", **REFUSED[name])
    with pytest.raises((ValueError, AttributeError, IndexError)) as error:
        differences(folder, utils)
    report(f"{type(error.value).__name__}: {error.value}"[:120].replace("\n", " "))
    problems = engine_problems(small_config(**REFUSED[name]), "mlx-lm")
    assert any(not problem.is_silent for problem in problems)
