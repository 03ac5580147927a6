"""`upstream/deferred.py`: what `save_pretrained` asks a tensor that is not there yet."""

import json

import pytest
import torch
from builders import tiny_model
from safetensors.torch import load_file
from touchpoints import CHANGED

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.upstream.deferred import DeferredTensor

pytestmark = pytest.mark.core


def deferred(number, made, shape=(50, 40)):
    def make():
        made.append(number)
        return torch.full(shape, float(number))

    return DeferredTensor(shape, torch.float32, make)


def test_tensors_are_made_when_their_file_is_written(tmp_path, monkeypatch):
    model, made, files = tiny_model(), [], []
    from transformers import modeling_utils

    write = modeling_utils.safe_save_file

    def noted(tensors, path, **kwargs):
        files.append(list(made))
        return write(tensors, path, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", noted)
    state = {f"number_{i:02d}": deferred(i, made) for i in range(9)}
    monkeypatch.setattr(KimiLinearForCausalLM, "stored_state", lambda *_: dict(state))
    model.save_pretrained(tmp_path, max_shard_size="24KB")
    assert files == [list(range(3)), list(range(6)), list(range(9))], CHANGED
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 9 * 50 * 40 * 4, CHANGED
    for name, file in index["weight_map"].items():
        number = float(name.removeprefix("number_"))
        assert load_file(tmp_path / file)[name].eq(number).all()


def test_what_computes_with_one_has_it_made():
    made = []
    tensor = deferred(3, made)
    assert not made and tensor.shape == (50, 40) and tensor.dtype == torch.float32
    assert torch.equal(tensor + 1, torch.full((50, 40), 4.0)) and made == [3]


def test_a_tensor_of_another_shape_is_a_mistake():
    tensor = DeferredTensor((2, 3), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(AssertionError):
        tensor.contiguous()
