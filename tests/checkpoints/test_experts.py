"""`checkpoints/experts.py`: the one table of where experts' matrices stand."""

import copy
import pickle

import pytest
import torch
from builders import tiny_model
from safetensors.torch import load_file

from kimi_linear.checkpoints.experts import ExpertMatrix, split_names

pytestmark = pytest.mark.core


def test_names_and_places():
    name = "model.layers.1.block_sparse_moe.experts.7.w3.weight"
    matrix = ExpertMatrix.from_name(name)
    assert matrix == ExpertMatrix("model.layers.1.block_sparse_moe.experts.", 7, "w3")
    assert matrix.name == name and matrix.fused_name.endswith(".experts.gate_up_proj")
    fused = torch.arange(8 * 6 * 5).view(8, 6, 5)
    assert torch.equal(matrix.place(fused), fused[7, 3:])
    split = dict(split_names(matrix.fused_name, (8, 6, 5)))
    assert len(split) == 16 and split[name] == (3, 5)
    for other in (
        "shared_experts.down_proj.weight",
        "shared_experts.0.w1.weight",
        "lm_head.weight",
    ):
        assert ExpertMatrix.from_name(other) is None
        assert list(split_names(other, (4, 5))) == [(other, (4, 5))]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_model_loads_into_itself(tmp_path, copied):
    """Hooks that load are copied with the modules that they belong to."""
    model, other = tiny_model(), tiny_model(seed=5)
    model.save_pretrained(tmp_path)
    before = {name: x.clone() for name, x in other.state_dict().items()}
    again = copied(other)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(other.state_dict()[name], before[name]), name


def test_a_part_of_a_model_takes_the_checkpoints_names(tmp_path):
    model, other = tiny_model(), tiny_model(seed=5)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for path in ("model.layers.1", "model.layers.1.block_sparse_moe.experts"):
        part = {n.removeprefix(f"{path}."): x for n, x in saved.items() if n.startswith(f"{path}.")}
        other.get_submodule(path).load_state_dict(part)
        expected = model.get_submodule(path).state_dict()
        for name, tensor in other.get_submodule(path).state_dict().items():
            assert torch.equal(tensor, expected[name]), name
