"""llama.cpp computes what scripts/export_gguf.py makes as we do, and what is said of the rest."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_gguf
import forked_exports
import pytest
from engine_models import FIELDS, LINEAR, small_config, write_engine_model
from export_gguf import Export, Settings
from exporting.checks import ExportError
from exporting.forward import check_ids, difference, llama_forward
from exporting.plan import Plan
from tokenizers import Tokenizer

from kimi_linear import KimiLinearConfig, engine_problems
from kimi_linear.tokenizer import train_bpe

pytestmark = pytest.mark.engines

# In float32.
ALLOWED = 1e-3
MENDED: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "shared experts unset": {"num_shared_experts": None},
    "groups": {"num_expert_group": 4, "topk_group": 2},
    "groups, biases below 0": {"num_expert_group": 4, "topk_group": 1, "shift": -3.0},
    "more KDA heads": {"num_attention_heads": 2},
    "more MLA heads": {"linear_attn_config": {**LINEAR, "num_heads": 3}},
    "all of them": {
        "tie_word_embeddings": True,
        "num_shared_experts": None,
        "num_attention_heads": 3,
        "num_expert_group": 2,
    },
}
# What the plain converter's file is wrong in, and what is no file or does not run.
SILENT: dict[str, dict[str, Any]] = {
    "renormalize": {"moe_renormalize": False},
    "one expert": {"num_experts_per_token": 1},
    "groups": {"num_expert_group": 4, "topk_group": 1},
    "no shared expert": {"num_shared_experts": 0},
    "activation": {"hidden_act": "gelu"},
}
REFUSED: dict[str, dict[str, Any]] = {
    "shared experts unset": {"num_shared_experts": None},
    "every second": {"moe_layer_freq": 2},
    "tied": {"tie_word_embeddings": True},
    "query rank": {"q_lora_rank": 32},
    "more KDA heads": {"num_attention_heads": 2},
    "only KDA": {"linear_attn_config": {**LINEAR, "full_attn_layers": []}},
    "only MLA": {"linear_attn_config": {**LINEAR, "kda_layers": []}},
}
ALLOWED_TYPES = {"f16": 0.01, "bf16": 0.1, "q8_0": 0.1, "q6_k": 0.2, "q5_k_m": 0.4}
TYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m", "q2_k")
Report = Callable[[str], None]


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_gguf, "run_python", forked_exports.run_python)


def export(folder: Path, llama_cpp: Path, kind: str, plan: Plan) -> Export:
    return Export(folder, llama_cpp, plan, Settings(folder=folder, llama_cpp=llama_cpp, type=kind))


def plain(folder: Path, llama_cpp: Path, config: KimiLinearConfig) -> float:
    """How far llama.cpp is off with the converter as it is, but for the tokenizer's name."""
    fields = {**config.to_dict(), "architectures": ["KimiLinearForCausalLM"]}
    made = export(folder, llama_cpp, "f32", Plan(config, fields, {}, {}, False, 0, []))
    file, program = folder / "plain.gguf", llama_cpp / "build" / "bin" / "llama-perplexity"
    made.convert(file, "f32")
    written = llama_forward(program, file, 1, made.probe)
    return difference(written.log_probs, made.log_probs)[0]


@pytest.mark.parametrize("name", [*FIELDS, *MENDED])
def test_logits(
    name: str, tmp_path: Path, llama_cpp: Path, capfd: pytest.CaptureFixture[str], report: Report
) -> None:
    folder = write_engine_model(tmp_path / "model", **{**FIELDS, **MENDED}[name])
    file = export_gguf.main(folder=folder, llama_cpp=llama_cpp, type="f32", threads=1)
    found = re.search(r"logits differ by (\S+) of their spread", capfd.readouterr().out)
    assert found is not None
    assert float(found[1]) < ALLOWED
    made = export(folder, llama_cpp, "f32", Plan(small_config(), {}, {}, {}, False, 0, []))
    ratios = {"at once": float(found[1])}
    for batch in (48, 1):
        program = llama_cpp / "build" / "bin" / "llama-perplexity"
        written = llama_forward(program, file, 1, made.probe, batch)
        ratios[f"{batch} a call"] = difference(written.log_probs, made.log_probs)[0]
    report(", ".join(f"{ratio:.1e} {how}" for how, ratio in ratios.items()))
    assert max(ratios.values()) < ALLOWED


@pytest.mark.parametrize("kind", TYPES)
def test_types(
    kind: str, tmp_path: Path, llama_cpp: Path, capfd: pytest.CaptureFixture[str], report: Report
) -> None:
    # Rows of 256, the k-quants' block, and no choice of experts, which rounding would change.
    fields = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512}
    fields |= {"num_experts_per_token": 8}
    folder = write_engine_model(tmp_path / "model", **fields)
    export_gguf.main(folder=folder, llama_cpp=llama_cpp, type=kind, threads=1)
    said = capfd.readouterr().out
    found = re.search(rf"^{kind}: llama.cpp's logits differ by (\S+) of", said, re.MULTILINE)
    assert found is not None
    report(f"{float(found[1]):.1e}, {re.search(rf'^{kind}: .*tensors (.*), the', said, 8)[1]}")
    if kind in ALLOWED_TYPES:  # below, what is random bears no rounding
        assert float(found[1]) < ALLOWED_TYPES[kind]


@pytest.mark.parametrize("name", SILENT)
def test_what_is_wrong_without_an_error(
    name: str, tmp_path: Path, llama_cpp: Path, report: Report
) -> None:
    config = small_config(**SILENT[name])
    assert any(problem.is_silent for problem in engine_problems(config, "llama.cpp"))
    ratio = plain(write_engine_model(tmp_path / "model", **SILENT[name]), llama_cpp, config)
    report(f"{ratio:.1e}")
    assert ratio > 0.05


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path, llama_cpp: Path, report: Report) -> None:
    config = small_config(**REFUSED[name])
    assert any(not problem.is_silent for problem in engine_problems(config, "llama.cpp"))
    folder = write_engine_model(tmp_path / "model", **REFUSED[name])
    with pytest.raises(ExportError) as error:
        plain(folder, llama_cpp, config)
    said = str(error.value).replace(str(tmp_path), "").replace(f"{llama_cpp}/", "")
    report(" ".join(said.split())[:160])


def test_texts_with_combining_marks_are_cut_otherwise(tmp_path: Path, llama_cpp: Path) -> None:
    """What the export says of them; once this fails, it need not be said any more."""
    text = "नमस्ते दुनिया, यह हिन्दी का एक वाक्य है। " * 40
    ranks = train_bpe([text], 540)
    folder = write_engine_model(tmp_path / "model", ranks=ranks)
    file = export_gguf.main(folder=folder, llama_cpp=llama_cpp, type="f32", compare=0, threads=1)
    written = llama_forward(llama_cpp / "build" / "bin" / "llama-perplexity", file, 1, text)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(ExportError, match="llama.cpp cuts the probe into other tokens"):
        check_ids(written, tokenizer, text)
