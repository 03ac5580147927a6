"""A packed model over HTTP: pushed by a process with the package, loaded by one without it."""

import json
import os
import sys

import pytest
from hub import Hub, environment, run

pytestmark = pytest.mark.transformers

PUSH = """
import sys
import torch
from few_bits_models import mixed, small_model
from kimi_linear import quantize_model

torch.set_num_threads(1)
model = quantize_model(small_model().to(torch.bfloat16), mixed())
ids = torch.arange(12)[None]
with torch.no_grad():
    torch.save({"ids": ids, "logits": model(ids).logits}, f"{sys.argv[1]}/expected.pt")
model.push_to_hub("me/packed", max_shard_size="300KB")
model.save_pretrained(f"{sys.argv[1]}/local", push_to_hub=True, repo_id="me/saved")
"""

LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
expected = torch.load(f"{sys.argv[1]}/expected.pt")
for name in ("me/packed", "me/saved"):
    model, info = AutoModelForCausalLM.from_pretrained(
        name, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert "PackedWeights" in repr(model.lm_head.weight)
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"])
assert "kimi_linear" not in sys.modules and "compressed_tensors" not in sys.modules
"""


def test_a_packed_model_is_pushed_and_loaded(tmp_path):
    with Hub() as server:
        path = os.pathsep.join(filter(None, sys.path))
        pushing = environment(server, tmp_path / "home", PYTHONPATH=path)
        run(["-c", PUSH, str(tmp_path)], pushing, tmp_path)
        run(["-I", "-c", LOAD, str(tmp_path)], environment(server, tmp_path / "empty"), tmp_path)
        files = server.files("me/packed")
    config = json.loads(files["config.json"])
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert "model.safetensors.index.json" in files
    shards = [len(x) for name, x in files.items() if name.endswith(".safetensors")]
    assert len(shards) > 2 and max(shards) < 400_000
