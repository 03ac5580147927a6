"""Products taken at once in training, beside the modules one by one: on a GPU, or interpreted.

Which calls they take is tested without kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_config
from interpreter import DEVICE, DTYPES, draw, with_kernels
from tolerance import assert_close
from torch import nn

from kimi_linear.inputs.layout import SequenceLayout, sequence_layout
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention
from kimi_linear.layers.mlp import KimiLinearMLP
from kimi_linear.ops import joint_products
from kimi_linear.ops.joint_products import joint_weights
from kimi_linear.ops.kda.recurrent import l2norm
from kimi_linear.ops.short_conv import convolved_projections
from kimi_linear.ops.short_conv.convolution import short_convolution
from kimi_linear.ops.short_conv.training_kernels import convolve_columns, convolve_columns_backward

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]


def packed(*lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    total = sum(lengths)
    return sequence_layout(1, total, position_ids=positions.to(DEVICE), device=torch.device(DEVICE))


# one program of the backward kernel has 61 tokens and looks three ahead
LAYOUTS = [
    (1, (1,)),
    (2, (1,)),
    (2, (5,)),
    (1, (61,)),
    (3, (62,)),
    (1, (130,)),
    (None, (3, 1, 1, 2, 60, 1, 64)),
    (None, (59, 3, 61)),
]


def by_head(x, head_dim):
    return l2norm(x.unflatten(-1, (-1, head_dim))).flatten(-2)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, lengths, width", [*[(*layout, 4) for layout in LAYOUTS], (2, (5,), 2), (2, (5,), 3)]
)
def test_convolutions(rows, lengths, width, dtype):
    """Of columns that have others behind them, whose gradient is left alone."""
    layout, row = SequenceLayout() if rows else packed(*lengths), sum(lengths)
    M, D, others, K = row * (rows or 1), 20, 7, 10
    y, grads = draw(M, 3 * D + others, dtype=dtype), [draw(M, D, dtype=dtype) for _ in range(3)]
    taps = draw(3, D, width, dtype=dtype)
    wide = F.pad(taps, (4 - width, 0))
    outputs = convolve_columns(y, wide, layout.token_starts, row, K)
    dy = torch.full_like(y, 7)
    dtaps = convolve_columns_backward(grads, y, wide, layout.token_starts, row, K, dy)

    exact_y = y.double().requires_grad_()
    for i, (out, grad) in enumerate(zip(outputs, grads, strict=True)):
        x = exact_y[:, i * D : (i + 1) * D].view(rows or 1, row, D)
        weight = taps[i].double().requires_grad_()
        wanted, _ = short_convolution(x, weight, cu_seqlens=layout.cu_seqlens, backend="torch")
        if i < 2:
            wanted = by_head(wanted, K)
        assert_close(out, wanted.view(M, D).to(dtype), dtype, "out")
        wanted.backward(grad.double().view_as(wanted))
        assert_close(dtaps[i, :, 4 - width :], weight.grad.float(), dtype, "taps")
    assert_close(dy[:, : 3 * D], exact_y.grad[:, : 3 * D].to(dtype), dtype, "y")
    assert dy[:, 3 * D :].eq(7).all()


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(joint_products, "DEVICES", ("cpu", "cuda"))


def gradients(out, parameters, grad):
    return torch.autograd.grad(out, parameters, grad)


def kda_layer(**fields):
    torch.manual_seed(1)
    layer = KimiLinearDeltaAttention(tiny_config(**fields), 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.to(DEVICE)


def readers(layer):
    """The layer's six projections, and the taps of its convolutions."""
    qkv = layer.q_proj, layer.k_proj, layer.v_proj
    convolutions = layer.q_conv1d, layer.k_conv1d, layer.v_conv1d
    linears = *qkv, layer.f_a_proj, layer.g_a_proj, layer.b_proj
    return linears, [convolution.weight for convolution in convolutions]


def project(layer, x, layout):
    linears, _ = readers(layer)
    return convolved_projections(
        x,
        linears[:3],
        (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d),
        linears[3:],
        layer.head_dim,
        cu_seqlens=layout.cu_seqlens,
        token_starts=lambda: layout.token_starts,
    )


def total(projected):
    assert projected.is_normalised
    return sum(each.sum() for each in (*projected[:3], *projected.others))


@with_kernels
@pytest.mark.parametrize("lengths", [(70,), (3, 1, 66)])
def test_projections_of_a_kda_layer(anywhere, lengths):
    layer, layout = kda_layer(), packed(*lengths)
    x = draw(1, sum(lengths), layer.q_proj.in_features).requires_grad_()
    linears, taps = readers(layer)
    *qkv, others, state, is_normalised, at_cut = project(layer, x, layout)
    assert is_normalised and state is None and at_cut is None
    ours = [*(each.flatten(-2) for each in qkv), *others]
    products = [linear(x) for linear in linears]
    for i, tap in enumerate(taps):
        products[i] = short_convolution(products[i], tap, cu_seqlens=layout.cu_seqlens)[0]
        if i < 2:
            products[i] = by_head(products[i], layer.head_dim)
    grads = [draw(*each.shape) for each in products]
    wanted_x = [x, *(linear.weight for linear in linears), *taps]
    for actual, wanted in zip(ours, products, strict=True):
        assert_close(actual, wanted, torch.float32)
    actual, wanted = (torch.autograd.grad(each, wanted_x, grads) for each in (ours, products))
    for mine, theirs in zip(actual, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert_close(mine, theirs, torch.float32)


@with_kernels
def test_gated_mlp(anywhere):
    torch.manual_seed(0)
    mlp = KimiLinearMLP(tiny_config(), 24).to(DEVICE)
    x = draw(2, 5, mlp.gate_proj.in_features).requires_grad_()
    leaves, grad = [x, *mlp.parameters()], draw(*x.shape)
    assert joint_weights(x, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)) is not None
    ours = mlp(x)
    theirs = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert_close(ours, theirs, torch.float32)
    for mine, wanted in zip(
        gradients(ours, leaves, grad), gradients(theirs, leaves, grad), strict=True
    ):
        assert_close(mine, wanted, torch.float32)


@with_kernels
def test_frozen_parts_get_no_gradient(anywhere):
    """A frozen matrix among others, an input that wants none, and all matrices frozen."""
    layer, layout = kda_layer(), packed(9)
    layer.k_proj.weight.requires_grad_(False)
    layer.v_conv1d.weight.requires_grad_(False)
    x = draw(1, 9, layer.q_proj.in_features)
    linears, taps = readers(layer)
    total(project(layer, x, layout)).backward()
    assert layer.k_proj.weight.grad is None and layer.v_conv1d.weight.grad is None
    assert layer.q_proj.weight.grad.isfinite().all() and x.grad is None
    layer.requires_grad_(False)
    assert joint_weights(x, linears, *taps) is None
    assert joint_weights(x.requires_grad_(), linears, *taps) is not None
    total(project(layer, x, layout)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("change", ["hook", "bias", "adapter", "dtype", "gathered", "no_grad"])
def test_what_is_not_plain_goes_through_its_modules(monkeypatch, anywhere, change):
    monkeypatch.setattr(joint_products, "triton", object())
    layer = KimiLinearDeltaAttention(tiny_config(), 0)
    x = torch.randn(1, 4, layer.q_proj.in_features)
    assert joint_weights(x, readers(layer)[0]) is not None
    if change == "hook":
        layer.k_proj.register_forward_hook(lambda *args: None)
    elif change == "bias":
        layer.k_proj.bias = nn.Parameter(torch.zeros(layer.k_proj.out_features))
    elif change == "adapter":
        layer.k_proj = nn.Sequential(layer.k_proj)
        layer.k_proj.weight = layer.k_proj[0].weight
    elif change == "dtype":
        layer.k_proj.double()
    elif change == "gathered":  # later, by a hook of its module
        layer.k_proj.weight = nn.Parameter(torch.empty(0))
    else:
        layer.eval()
        with torch.no_grad():
            assert joint_weights(x, readers(layer)[0]) is None
        return
    assert joint_weights(x, readers(layer)[0]) is None


def test_starts_of_tokens():
    assert SequenceLayout().token_starts is None
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    layout = sequence_layout(2, 3, attention_mask=mask)
    assert layout.token_starts.tolist() == [0, 0, 2, 2]
    positions = torch.tensor([[0, 1, 0, 0, 1]])
    assert sequence_layout(1, 5, position_ids=positions).token_starts.tolist() == [0, 0, 2, 3, 3]
