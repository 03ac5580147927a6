"""Weights pushed into a running model under the released names."""

import random

import pytest
import torch
from accelerate import cpu_offload
from builders import tiny_model, token_ids
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear import KimiLinearForCausalLM

pytestmark = pytest.mark.core

IDS = token_ids(2, 12)
EXPERT = "model.layers.2.block_sparse_moe.experts.3"
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=96)


def official(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def shuffled(tensors, seed=0):
    """By an iterator, in any order: experts' matrices far from each other."""
    items = list(tensors.items())
    random.Random(seed).shuffle(items)
    yield from items


class Allocations(TorchDispatchMode):
    """Names of operators that return memory of their own."""

    def __init__(self, model):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in model.state_dict().values()}
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if each.untyped_storage().data_ptr() not in self.known:
                self.found.add(str(func))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_takes_anothers_weights_in_place(tmp_path, dtype, tied):
    fields = {"tie_word_embeddings": tied}
    model, other = tiny_model(**fields).to(dtype), tiny_model(seed=1, **fields)
    tensors = official(other, tmp_path)
    expected = other.to(dtype)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert not torch.equal(model.generate(IDS, **GREEDY), expected.generate(IDS, **GREEDY))
    with Allocations(model) as allocations:
        assert model.load_weights(shuffled(tensors), strict=True) == set(tensors)
    assert not allocations.found
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    for (name, x), y in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y) and x.dtype == y.dtype, name
    assert torch.equal(model.generate(IDS, **GREEDY), expected.generate(IDS, **GREEDY))


def test_training_and_pushing_take_turns(tmp_path):
    """As in reinforcement learning: an optimizer goes on with what was pushed."""
    model, other = tiny_model().train(), tiny_model(seed=1).train()
    steps = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other)]
    model(IDS, labels=IDS).loss.backward()
    steps[0].step(), steps[0].zero_grad()
    model.load_weights(official(other, tmp_path).items())
    for each, optimizer in zip((model, other), steps, strict=True):
        each(IDS, labels=IDS).loss.backward()
        optimizer.step()
    for (name, x), y in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_what_does_not_come_stays(tmp_path):
    model = tiny_model()
    tensors, before = official(tiny_model(seed=1), tmp_path), tiny_model().state_dict()
    name = f"{EXPERT}.w3.weight"
    assert model.load_weights([(name, tensors[name])]) == {name}
    after = model.state_dict()
    fused = "model.layers.2.block_sparse_moe.experts.gate_up_proj"
    assert torch.equal(after[fused][3, 24:], tensors[name])
    after[fused][3, 24:] = before[fused][3, 24:]
    assert all(torch.equal(after[each], before[each]) for each in before)
    del tensors[name], tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"experts.3.w3.weight, model.norm.weight did not come"):
        model.load_weights(tensors.items(), strict=True)


def test_the_models_own_names_and_the_backbones_do_too(tmp_path):
    model, other = tiny_model(), tiny_model(seed=1)
    own = dict(other.named_parameters()) | dict(other.named_buffers())
    assert model.load_weights(own.items(), strict=True) == set(own)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())
    bare = {n.removeprefix("model."): x for n, x in official(other, tmp_path).items()}
    assert tiny_model().load_weights(bare.items(), strict=True) == set(bare)
    del bare["lm_head.weight"]
    assert tiny_model().model.load_weights(bare.items(), strict=True) == set(bare)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(2), "layers.9.mlp.* no tensor of the mod"),
        (
            "model.layers.2.block_sparse_moe.experts.6.w1.weight",
            torch.ones(24, 40),
            "num_experts=6",
        ),
        (
            f"{EXPERT}.w2.weight",
            torch.ones(24, 40),
            r"shape \[24, 40\], the model needs \[40, 24\]",
        ),
        ("model.norm.weight", torch.ones(1), r"norm.weight has shape \[1\], .* needs \[40\]"),
        ("model.norm.weight", torch.ones(40, dtype=torch.int8), "norm.weight has dtype torch.int8"),
        (
            "model.norm.weight",
            torch.ones(40, device="meta"),
            "norm.weight has no data, on the meta",
        ),
        (
            "model.norm.weight",
            torch.ones(40).to_sparse(),
            "norm.weight has layout torch.sparse_coo",
        ),
        ("model.norm.weight", [1.0] * 40, "norm.weight is of type list: it must"),
    ],
)
def test_what_does_not_fit_is_named(name, value, message):
    model, before = tiny_model(), tiny_model().state_dict()
    with pytest.raises(ValueError, match=message):
        model.load_weights([(name, value)])
    assert all(torch.equal(x, before[each]) for each, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.norm.weight": torch.ones(40)}, "weights is of type dict"),
        (3, "weights is of type int"),
        (torch.ones(()), "weights is of type Tensor"),
        (None, "weights is of type NoneType"),
        (["model.norm.weight"], "item 0 is 'model.norm.weight'"),
        (["ab"], "item 0 is 'ab'"),
        ([("model.norm.weight",)], "item 0 is tuple of str"),
        ([(3, torch.ones(40))], "item 0 is tuple of int, Tensor"),
        (torch.ones(2, 2), "item 0 is Tensor"),
    ],
)
def test_what_is_no_pairs_is_named(weights, message):
    """Bug: tracebacks of unpacking, and names taken apart into letters."""
    with pytest.raises(ValueError, match=f"{message}.*; allowed: pairs of a name and a"):
        tiny_model().load_weights(weights)


def test_tied_weights_that_differ_are_an_error():
    model = tiny_model(tie_word_embeddings=True)
    embedding = torch.randn(97, 40)
    pairs = [("lm_head.weight", embedding), ("model.embed_tokens.weight", embedding)]
    assert len(model.load_weights(pairs)) == 2
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    pairs[1] = ("model.embed_tokens.weight", embedding + 1)
    with pytest.raises(ValueError, match="embed_tokens.weight differs from lm_head.weight"):
        model.load_weights(pairs)


def test_weights_that_are_elsewhere_are_refused():
    model = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="norm.weight is on the meta device: load_weights takes"):
        model.load_weights([("model.norm.weight", torch.ones(40))])
    with torch.device("meta"):
        empty = KimiLinearForCausalLM(model.config)
    with pytest.raises(ValueError, match="on the meta device"):
        empty.load_weights([(f"{EXPERT}.w1.weight", torch.ones(24, 40))])
