"""Models whose activations are quantised for products with float8 weights, by the interpreter or on
a GPU: which layers and calls, and how far logits are from those of 16-bit activations."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import token_ids
from few_bits_models import packed_of, small_model
from float8_references import exact, in_full, relative, round_as_torch
from interpreter import DEVICE, IS_INTERPRETED, with_kernels
from torch import nn

import kimi_linear.ops.projections as projections
from kimi_linear import KimiLinearQuantizationConfig, quantize_model
from kimi_linear.ops.experts import grouped_experts, packed, prefill
from kimi_linear.ops.experts.sort import sort_pairs
from kimi_linear.ops.packed import float8, unpacking
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.ops.projections import LinearInput, project
from kimi_linear.ops.quantized import QuantizedTensor
from kimi_linear.schemes import NAMED, Scheme

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]
DTYPE = torch.float32 if IS_INTERPRETED else torch.bfloat16
PARTS = ("experts", "shared_experts", "attention")
CLOSE = 2e-6 if IS_INTERPRETED else 4e-3  # as in ops/test_float8_kernels.py


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Also for a few rows and outputs, so that tests are quick."""
    monkeypatch.setattr(projections, "MANY_ROWS", 8)
    monkeypatch.setattr(projections, "MANY_OUTPUTS", 8)
    monkeypatch.setattr(packed, "FLOAT8_TOKENS", 8)
    if not IS_INTERPRETED:
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs products of float8 numbers")
        return
    round_as_torch(monkeypatch)
    monkeypatch.setattr(prefill, "has_kernels", lambda *tensors: True)
    monkeypatch.setattr(prefill, "DTYPES", (torch.float32,))
    for module in (float8, unpacking):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
        monkeypatch.setattr(module, "DTYPES", (torch.float32,))


@pytest.fixture
def quantized(monkeypatch):
    """Sizes of what is quantised, in order."""
    found = []

    def noted(x, *places):
        found.append(tuple(x.shape))
        return float8.quantize_rows(x, *places)

    for module in (projections, packed):
        monkeypatch.setattr(module, "quantize_rows", noted)
    return found


def layer(name="fp8", num_outputs=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, 128, generator=generator).to(DTYPE)
    linear = nn.Linear(128, num_outputs, bias=False, device=DEVICE, dtype=DTYPE).eval()
    held = quantize(weight.to(DEVICE), Scheme(**NAMED[name]))
    linear.weight = nn.Parameter(held, requires_grad=False)
    return linear


def rows(*shape):
    return torch.randn(*shape, 128, device=DEVICE).to(DTYPE)


@with_kernels
@torch.no_grad()
def test_layers_of_one_input_quantise_it_once(quantized):
    x, layers = rows(2, 5), [layer(seed=1), layer("fp8w", seed=2), layer(num_outputs=8, seed=3)]
    read = LinearInput(x)
    found = [read.through(each) for each in layers]
    assert quantized == [(10, 128)]
    for each, out in zip(layers, found, strict=True):
        expected = x.double() @ exact(each.weight).t()
        assert out.shape == expected.shape and out.dtype == DTYPE
        assert relative(out, expected) < 0.035
    assert torch.equal(found[1], layers[1](x))  # its activations stay in 16 bits


@with_kernels
@torch.no_grad()
def test_attributes_of_weights_cost_the_host_little(monkeypatch):
    """They are not read by way of `__torch_function__`: a layer's products read some twenty."""
    own, asked = QuantizedTensor.__torch_function__.__func__, []

    def noted(cls, func, *args):
        asked.append(func)
        return own(cls, func, *args)

    x, layers = rows(9), [layer("fp8"), layer("fp8w")]
    experts = SimpleNamespace(training=False, act_fn=nn.SiLU())
    experts.gate_up_proj, experts.down_proj = (
        quantize(torch.randn(2, n, 128).to(DEVICE, DTYPE), Scheme(**NAMED["fp8"]))
        for n in (256, 128)
    )
    index, weights = torch.tensor([[0, 1]] * 9, device=DEVICE), torch.ones(9, 2, device=DEVICE)
    monkeypatch.setattr(QuantizedTensor, "__torch_function__", classmethod(noted))
    for each in layers:
        project(x, each)
    grouped_experts(experts, x, index, weights)
    assert asked == [F.linear]


@with_kernels
def test_what_is_called_as_it_is(quantized, monkeypatch):
    """Few rows or outputs, training, recorded graphs, hooks, and layers with a bias."""
    x, linear = rows(9), layer()
    graph = x.clone().requires_grad_()
    assert project(graph, linear).requires_grad
    expected = graph @ linear.weight.dequantized().t()
    assert torch.equal(project(graph, linear), expected)
    with torch.no_grad():
        project(x[:7], linear)
        project(x, layer(num_outputs=7))
        project(x, linear.train())
        project(x, nn.Linear(128, 4, device=DEVICE, dtype=DTYPE))
        hooked = layer()
        hooked.register_forward_hook(lambda *args: None)
        project(x, hooked)
        if torch.amp.is_autocast_available(DEVICE):
            with torch.autocast(DEVICE, dtype=torch.float16):
                project(x, layer())
        assert quantized == []
        project(x, linear.eval())
        assert quantized == [(9, 128)]


@with_kernels
@torch.no_grad()
def test_experts(quantized, monkeypatch):
    def held(shape, name):
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
        return quantize(weights / 16, Scheme(**NAMED[name]))

    x = rows(12)
    experts = torch.rand(12, 4, device=DEVICE).topk(2, dim=-1).indices
    pairs = sort_pairs(experts, 4)
    sizes = (4, 256, 128), (4, 128, 128)
    found, wide = (
        packed.packed_products(x, pairs, tuple(held(s, name) for s in sizes))
        for name in ("fp8", "fp8w")
    )
    assert quantized == [(12, 128)]
    assert 1e-3 < relative(found, wide.double()) < 0.06  # two products, one after the other
    pairs = sort_pairs(experts[:4], 4)
    packed.packed_products(x[:4], pairs, tuple(held(s, "fp8") for s in sizes))
    assert len(quantized) == 1


@with_kernels
@torch.no_grad()
def test_models(quantized, monkeypatch):
    """Each product is that of its own input in float64, and logits stay close to those of 16-bit
    activations; switched off, nothing is quantised. Each token takes all experts: another choice
    of them would decide how close."""
    ids, found, errors = token_ids(1, 12).to(DEVICE), {}, []

    def checked(read, weights, dtype):
        out = float8.float8_linear(read, weights, dtype)
        errors.append(relative(out, in_full(read, weights.shape[1]) @ exact(weights).t()))
        return out

    monkeypatch.setattr(projections, "float8_linear", checked)
    for name in NAMED:
        model = small_model(num_hidden_layers=4, num_experts=4, num_experts_per_token=4)
        quantize_model(model.to(DTYPE), KimiLinearQuantizationConfig(**dict.fromkeys(PARTS, name)))
        model = model.to(DEVICE)
        schemes = {each.scheme for each in packed_of(model).values()}
        assert schemes == {Scheme(**NAMED[name])}
        found[name] = model(ids).logits
        assert bool(quantized) == (name == "fp8")
        quantized.clear()
        model(ids[:, :4])
        assert not quantized
    assert errors and max(errors) < CLOSE
    assert 1e-3 < relative(found["fp8"], found["fp8w"].double()) < 0.25
