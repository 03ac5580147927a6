"""scripts/export_gguf.py: what it plans, refuses and checks; with llama.cpp in tests/engines."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import commands
import export_gguf
import forked_exports
import numpy as np
import pytest
import torch
from exporting.checks import ExportError, expected_tensors
from exporting.forward import CHUNKS, LENGTH, difference, read_logits
from exporting.plan import make_plan, remarks
from exporting.template import llama_template
from fake_llama_cpp import make_checkout
from quantize_runs import make_snapshot
from transformers import AutoTokenizer

from kimi_linear import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    engine_problems,
)

pytestmark = pytest.mark.transformers

# As many MLA heads as KDA heads.
HEADS = {"num_attention_heads": 4}
LINEAR = {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}
# What llama.cpp has no room for, and zeros or copies make right.
MENDED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
    "shared experts unset": {"num_shared_experts": None},
    "groups": {"num_expert_group": 4, "topk_group": 2},
    "more KDA heads": {"num_attention_heads": 2},
    "more MLA heads": {"linear_attn_config": {**LINEAR, "num_heads": 3}},
    "all dense": {"first_k_dense_replace": 4, "num_shared_experts": None},
    "all": {
        "tie_word_embeddings": True,
        "num_shared_experts": None,
        "num_attention_heads": 3,
        "num_expert_group": 2,
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "renormalize": ({"moe_renormalize": False}, "moe_renormalize=False: computed as True"),
    "one expert": ({"num_experts_per_token": 1}, "num_experts_per_token=1"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "every second": ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "query rank": ({"q_lora_rank": 32}, "q_lora_rank=32"),
    "one kind": ({"linear_attn_config": {**LINEAR, "full_attn_layers": []}}, "layer_types"),
    "many experts": ({"num_experts": 1025}, "num_experts=1025"),
    "two": (
        {"moe_renormalize": False, "hidden_act": "relu", "tie_word_embeddings": True},
        "moe_renormalize=False: .*; hidden_act='relu'",
    ),
}


def config_of(**fields: Any) -> KimiLinearConfig:
    return KimiLinearConfig.from_preset("2m", **{**HEADS, **fields})


def shapes_of(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    """Of the parameters and biases of a model; experts are fused, which changes no size."""
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_snapshot(tmp_path_factory.mktemp("original"), **HEADS)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "small"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "llama.cpp")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_gguf, "run_python", forked_exports.run_python)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", MENDED)
def test_the_file_has_the_tensors_of_a_model_that_llama_cpp_computes(name: str) -> None:
    config = config_of(**MENDED[name])
    plan = make_plan(config, config.to_dict())
    shapes = shapes_of(config)
    if plan.ties_head:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    shapes |= plan.zeros
    for tensor, (axis, size) in plan.padded.items():
        shape = list(shapes[tensor])
        assert shape[axis] < size
        shape[axis] = size
        shapes[tensor] = tuple(shape)
    assert shapes == shapes_of(plan.config)
    sizes = [sum(map(np.prod, each.values())) for each in (shapes, expected_tensors(plan.config))]
    assert sizes[0] == sizes[1]
    ungrouped = KimiLinearConfig(
        **{**plan.config.to_dict(), "num_expert_group": 1, "topk_group": 1}
    )
    assert engine_problems(ungrouped, "llama.cpp") == []
    assert (plan.expert_groups > 0) == (name in ("groups", "all"))
    assert (plan.notes == []) == (name in ("as it is", "groups", "all dense"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(name: str) -> None:
    fields, message = REFUSED[name]
    config = config_of(**fields)
    with pytest.raises(ValueError, match=f"^llama.cpp does not compute this model: {message}"):
        make_plan(config, config.to_dict())


def test_the_template_for_llama_cpp_writes_the_same(original: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original)
    values = {"b": [1, 2.5, True, None, "ü\n\"<b>'", {}, []], "B": {"z": -1, "": "a", "A_": []}}
    function = {"parameters": {"type": "object", "x": values}, "name": "f", "description": ""}
    ids = ("functions.f:7", "functions.f:", "functions.f:x1", "call_1", "functions.g:0")
    calls = [{"id": each, "function": {"name": "f", "arguments": "{}"}} for each in ids]
    results = [{"role": "tool", "tool_call_id": each, "content": each} for each in ids]
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}, *results]
    chat = messages, [{"type": "function", "function": function}]
    wanted = tokenizer.apply_chat_template(*chat, tokenize=False)
    template = llama_template(tokenizer.chat_template)
    assert "sort_keys" not in template and "isdigit" not in template
    assert tokenizer.apply_chat_template(*chat, chat_template=template, tokenize=False) == wanted
    assert llama_template("{{ messages }}") == "{{ messages }}"


def test_remarks() -> None:
    assert len(remarks(config_of())) == 1
    linear = {**LINEAR, "head_dim": 48, "short_conv_kernel_size": 2}
    found = remarks(config_of(rms_norm_eps=1e-3, linear_attn_config=linear))
    assert [words.split("=")[0] for words in found[1:]] == [
        "rms_norm_eps",
        "KDA's head_dim",
        "short_conv_kernel_size",
    ]


@pytest.mark.parametrize("name", MENDED)
def test_an_export(name: str, tmp_path: Path, checkout: Path) -> None:
    folder = make_snapshot(tmp_path / "small", **{**HEADS, **MENDED[name]})
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    output = export_gguf.main(folder=folder, llama_cpp=checkout, type="f32")
    assert output == folder / "small-f32.gguf" and output.stat().st_size > 10**6
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"small-f32.gguf"}


def test_what_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout = make_checkout(tmp_path / "llama.cpp", programs=True)
    output = tmp_path / "out.gguf"
    export_gguf.main(folder=folder, llama_cpp=checkout, output=output)
    said, shown = capsys.readouterr()
    assert "q4_k_m: 89 tensors (89 F32), the tokenizer's ids" in said
    assert "bf16: 89 tensors" in said
    assert said.count("llama-perplexity is not built") == 2
    assert said.endswith(f"{output}: {output.stat().st_size / 1e6:,.1f} MB\n")
    assert "the converter's own words" in shown
    assert list(tmp_path.glob("_unfinished*")) == []


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        ("end", "llama.cpp's converter failed with status 3"),
        ("tensors", "tensor blk.0.attn_v.weight is missing; .*, and 1 more"),
        ("tokens", "tokens are not the tokenizer's"),
    ],
)
def test_a_wrong_file_takes_no_name(
    breaks: str, message: str, folder: Path, tmp_path: Path
) -> None:
    checkout, output = make_checkout(tmp_path / "llama.cpp", breaks), tmp_path / "out.gguf"
    output.write_text("older")
    with pytest.raises(ExportError, match=message):
        export_gguf.main(
            folder=folder, llama_cpp=checkout, type="f32", output=output, overwrite=True
        )
    assert output.read_text() == "older"
    assert list(tmp_path.glob("_unfinished*")) == []


def test_a_program_that_fails(folder: Path, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "llama.cpp", programs=True)
    with pytest.raises(ExportError, match="^llama-quantize failed: no such type$"):
        export_gguf.main(folder=folder, llama_cpp=checkout, type="q6_k")
    assert list(folder.glob("*.gguf")) == []


def test_arguments(folder: Path, checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    given = {"folder": folder, "llama_cpp": checkout, "type": "f32", "output": output}

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            export_gguf.main(**{**given, **changes})
        assert not output.exists()

    refused("^--type 'q1' is not allowed: it must be one of f32", type="q1")
    refused("^--threads 0 is not allowed", threads=0)
    refused("^--llama-cpp .* has no convert_hf_to_gguf.py", llama_cpp=tmp_path)
    refused("q4_k_m needs llama-quantize, .* --target llama-quantize", type="q4_k_m")
    refused("its folder is not there", output=tmp_path / "none" / "out.gguf")
    refused("is a folder", output=tmp_path)
    refused("is missing", folder=tmp_path)
    (checkout / "conversion" / "kimi_linear.py").unlink()
    refused("has no conversion/kimi_linear.py; allowed: a checkout")
    output.write_text("older")
    with pytest.raises(ValueError, match=r"is there already \(--overwrite replaces it\)$"):
        export_gguf.main(**given)
    assert output.read_text() == "older"


def test_folders_that_are_refused(folder: Path, checkout: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            export_gguf.main(folder=folder, llama_cpp=checkout, type="f32")

    config, tokenizer = folder / "config.json", folder / "tokenizer.json"
    text = config.read_text()
    edit(config, quantization_config={"quant_method": "compressed-tensors"})
    refused("is quantised; allowed: weights in 16 or 32 bits")
    edit(config, quantization_config=None, architectures=["KimiLinearBackbone"])
    refused("architectures is 'KimiLinearBackbone'; allowed: 'KimiLinearForCausalLM'")
    config.write_text(text)
    edit(config, moe_renormalize=False)
    refused("llama.cpp does not compute this model")
    config.write_text(text)
    content = json.loads(tokenizer.read_text())
    edit(tokenizer, model={**content["model"], "merges": []})
    refused("has no merges")
    tokenizer.write_text(json.dumps(content))
    edit(tokenizer, pre_tokenizer={"type": "ByteLevel", **dict.fromkeys(content, True)})
    refused("it cuts text otherwise than this package's tokenizers")
    tokenizer.unlink()
    refused("tokenizer.json is missing; allowed: a converted tokenizer")


def test_a_classifier_is_refused(original: Path, checkout: Path, tmp_path: Path) -> None:
    model = KimiLinearForSequenceClassification(config_of(num_hidden_layers=1))
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="'KimiLinearForSequenceClassification'; allowed"):
        export_gguf.main(folder=tmp_path / "classifier", llama_cpp=checkout, type="f32")


def test_the_command(folder: Path, checkout: Path, tmp_path: Path) -> None:
    command = [export_gguf.__file__, folder, "--llama-cpp", checkout, "--type", "f32"]
    done = commands.run([*command, "--output", tmp_path / "out.gguf"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").is_file()
    done = commands.run([*command, "--output", tmp_path / "out.gguf"])
    assert done.returncode == 2 and "is there already" in done.stderr


def logits_file(log_probs: np.ndarray) -> bytes:
    """What `--save-all-logits` writes of log probabilities that are multiples of 1/1024."""
    chunks, positions, vocab = log_probs.shape
    ids = np.arange(chunks * LENGTH, dtype=np.int32)
    content = b"_logits_" + struct.pack("<3i", LENGTH, vocab, chunks) + ids.tobytes()
    for row in log_probs.reshape(-1, vocab):
        codes = np.round((row - row.min()) * 1024).astype(np.uint16)
        content += struct.pack("<2f", 1 / 1024, row.min())
        content += np.append(codes, [0] * (vocab % 2)).astype(np.uint16).tobytes()
    return content


@pytest.mark.parametrize("vocab", [8, 9])
def test_logits_are_read(vocab: int) -> None:
    shape = (CHUNKS, LENGTH - 1 - LENGTH // 2, vocab)
    log_probs = np.random.default_rng(0).integers(-9999, 0, shape).astype(np.float32) / 1024
    written = read_logits(logits_file(log_probs))
    np.testing.assert_array_equal(written.log_probs, log_probs)
    assert written.ids.shape == (CHUNKS, LENGTH) and written.num_places == CHUNKS * 63
    with pytest.raises(ExportError, match="wrote no logits"):
        read_logits(b"")
    with pytest.raises(ExportError, match="in another form"):
        read_logits(logits_file(log_probs[:1]))


def test_difference() -> None:
    wanted = np.log(np.random.default_rng(0).dirichlet(np.ones(50), (2, 63))).astype(np.float32)
    assert difference(wanted, wanted) == (0, 1)
    ratio, same = difference(1.1 * wanted, wanted)
    assert 0.3 < ratio < 0.5 and same == 1
    other = wanted.copy()
    other[0, :20] = other[0, 1:21]
    assert difference(other, wanted)[0] == 0  # a few places say nothing
    assert difference(wanted[..., ::-1], wanted)[0] > 1
