"""Snapshots for tests of quantize.py, runs of it, and what they leave."""

import json
from pathlib import Path
from typing import Any

import quantize
import torch
from safetensors.torch import load_file

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.tokenizer import convert_tiktoken, save_tiktoken

SCRIPTS = Path(quantize.__file__).parent
INDEX = "model.safetensors.index.json"
PARTS = {
    "experts": "bits=3,group=32",
    "shared_experts": "bits=4,group=32,symmetric=false",
    "attention": "bits=8,group=none",
    "embeddings": "bits=8,group=64",
    "head": "bits=8,group=128",
}


def make_snapshot(folder: Path, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    """A folder with a tokenizer and a model of four layers, one of them dense, of eight experts."""
    torch.manual_seed(0)
    ids = {"vocab_size": 517, "bos_token_id": 261, "eos_token_id": 262, "pad_token_id": 516}
    model = KimiLinearForCausalLM(KimiLinearConfig.from_preset("2m", **{**ids, **fields}))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size="400KB")
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {pair: 256 + i for i, pair in enumerate([b"th", b"in", b"er", b"an", b" t"])}
    save_tiktoken(ranks, folder / "tiktoken.model")
    convert_tiktoken(folder / "tiktoken.model", folder)
    return folder


def make_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(" ".join(f"the {i} other {i * i} thing in an inn" for i in range(400)))
    return path


def run(snapshot: Path, output: Path, **options: Any) -> Path:
    return quantize.main(**settings(snapshot, output, **options))


def settings(snapshot: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Arguments of `main`, as JSON can tell them."""
    return {"snapshot": str(snapshot), "output": str(output), "device": "cpu", **PARTS, **options}


def calibration(text: Path) -> dict[str, Any]:
    """More of them, for a run that reads a text."""
    return {"calibrate": str(text), "calibration_tokens": 1024}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(ids).logits.float()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def shard_of_experts(snapshot: Path) -> tuple[Path, dict[str, torch.Tensor], str]:
    """A file that has an expert's second matrix, its tensors, and the matrix's name."""
    places = json.loads((snapshot / INDEX).read_text())["weight_map"]
    name = next(name for name in places if name.endswith("w2.weight"))
    return snapshot / places[name], load_file(snapshot / places[name]), name
