"""Short convolution on the CPU: against torch's conv1d, over splits, states and packings."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import kimi_linear.ops.short_conv.convolution as module
from kimi_linear.ops.fla import backend as fla_backend
from kimi_linear.ops.short_conv.convolution import short_convolution

pytestmark = pytest.mark.kernels

LENGTHS = [5, 1, 0, 2, 3, 0, 9]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def reference(x, weight, *, initial_state=None):
    """One sequence per row, by torch's grouped conv1d."""
    D, W = weight.shape[0], weight.shape[-1]
    past = initial_state
    if past is None:
        past = x.new_zeros(x.shape[0], D, W - 1)
    extended = torch.cat((past, x.transpose(1, 2)), dim=2)
    y = F.conv1d(extended, weight.reshape(D, 1, W), groups=D).transpose(1, 2)
    state = extended[:, :, extended.shape[2] - (W - 1) :]
    return F.silu(y), state


def grads_of(function, *leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y, state = function(*leaves)
    loss = (y * normal(*y.shape, seed=8)).sum() + (state * normal(*state.shape, seed=9)).sum()
    return [y, state, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 70])
@pytest.mark.parametrize("W", [2, 4, 5])
def test_conv1d(T, W):
    x, weight, state = normal(2, T, 7), normal(7, 1, W, seed=1), normal(2, 7, W - 1, seed=2)
    expected = grads_of(lambda x, w, s: reference(x, w, initial_state=s), x, weight, state)
    actual = grads_of(
        lambda x, w, s: short_convolution(x, w, initial_state=s, output_final_state=True),
        x,
        weight,
        state,
    )
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, torch.float64)


def test_without_state_and_both_weight_shapes():
    x, weight = normal(2, 9, 7), normal(7, 1, 4, seed=1)
    y, state = short_convolution(x, weight)
    assert state is None
    assert_close(y, reference(x, weight)[0], torch.float64)
    assert torch.equal(short_convolution(x, weight[:, 0])[0], y)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=8))
def test_any_split(cuts):
    x, weight, state = normal(2, 12, 7), normal(7, 4, seed=1), normal(2, 7, 3, seed=2)
    expected, final = reference(x, weight, initial_state=state)
    pieces = []
    for start, end in itertools.pairwise([0, *sorted(cuts), 12]):
        y, state = short_convolution(
            x[:, start:end], weight, initial_state=state, output_final_state=True
        )
        pieces.append(y)
    assert_close(torch.cat(pieces, dim=1), expected, torch.float64)
    assert torch.equal(state, final)


def separate(x, weight, states, ends):
    """Each packed sequence on its own."""
    results = [
        reference(x[:, a:b], weight, initial_state=states[n : n + 1])
        for n, (a, b) in enumerate(itertools.pairwise(ends))
        if b > a
    ]
    finals = iter(state for _, state in results)
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    kept = [next(finals) if size else states[n : n + 1] for n, size in enumerate(lengths)]
    return torch.cat([y for y, _ in results], dim=1), torch.cat(kept)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_is_separate(dtype):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=dtype)
    x, weight = normal(1, sum(LENGTHS), 6), normal(6, 4, seed=1)
    states = normal(len(LENGTHS), 6, 3, seed=2)
    expected = grads_of(lambda *a: separate(*a, cu_seqlens.tolist()), x, weight, states)
    actual = grads_of(
        lambda x, w, s: short_convolution(
            x, w, initial_state=s, output_final_state=True, cu_seqlens=cu_seqlens
        ),
        x,
        weight,
        states,
    )
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, torch.float64)


def test_packed_without_state():
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    x, weight = normal(1, sum(LENGTHS), 6), normal(6, 4, seed=1)
    expected = separate(x, weight, torch.zeros(len(LENGTHS), 6, 3).double(), cu_seqlens.tolist())
    actual = short_convolution(x, weight, output_final_state=True, cu_seqlens=cu_seqlens)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, torch.float64)


def test_packed_neighbours_never_leak():
    cu_seqlens = torch.tensor([0, 5, 6, 12])
    x, weight = normal(1, 12, 6), normal(6, 4, seed=1)
    clean, clean_state = short_convolution(
        x, weight, output_final_state=True, cu_seqlens=cu_seqlens
    )
    for bad, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        poisoned = x.clone()
        poisoned[:, start:end] = torch.nan
        y, state = short_convolution(
            poisoned, weight, output_final_state=True, cu_seqlens=cu_seqlens
        )
        good = [n for n in range(3) if n != bad]
        assert torch.equal(y[:, :start], clean[:, :start])
        assert torch.equal(y[:, end:], clean[:, end:])
        assert torch.equal(state[good], clean_state[good])


def test_state_is_a_copy():
    """A state that were a view would keep the whole input alive, and change with it."""
    x, weight = normal(2, 9, 7), normal(7, 4, seed=1)
    _, state = short_convolution(x, weight, output_final_state=True)
    assert state.is_contiguous()
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x, weight = normal(2, 70, 7, dtype=dtype), normal(7, 4, seed=1, dtype=torch.float32)
    old = normal(2, 7, 3, seed=2, dtype=dtype)
    y, state = short_convolution(x, weight, initial_state=old, output_final_state=True)
    assert y.dtype == state.dtype == dtype
    expected, final = reference(x.double(), weight.double(), initial_state=old.double())
    assert_close(y, expected, dtype)
    assert torch.equal(state.double(), final)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = short_convolution(x, weight, initial_state=old)
    assert torch.equal(again, y)


def test_no_tokens():
    old = normal(2, 7, 3)
    y, state = short_convolution(
        normal(2, 0, 7), normal(7, 4), initial_state=old, output_final_state=True
    )
    assert y.shape == (2, 0, 7)
    assert torch.equal(state, old)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "fla"}, "backend is 'fla', but the tensor is on 'cpu'"),
        ({"backend": "cuda"}, "allowed are 'auto', 'fla', 'torch'"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"x": torch.zeros(2, 9, 7), "weight": torch.zeros(7, 1, 4)}
    with pytest.raises(ValueError, match=message):
        short_convolution(**(arguments | change))


# ------------------------------------------------------------ the road to FLA, as far as a CPU sees
@pytest.fixture
def pretend_fla(monkeypatch):
    """FLA's two functions, with states W wide, computed by the torch path."""
    calls = []

    def causal_conv1d(x, weight, *, initial_state, cu_seqlens, **options):
        assert options == {"output_final_state": False, "backend": "triton", "activation": "silu"}
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        calls.append("conv")
        past = None if initial_state is None else initial_state[:, :, 1:]
        y, _ = module._torch_convolution(x, weight, past, cu_seqlens)
        return y, None

    def causal_conv1d_update(x, cache, *, weight, activation):
        assert activation == "silu"
        calls.append("update")
        assert cache.shape == (x.shape[0], *weight.shape)
        y, state = module._torch_convolution(x, weight, cache[:, :, 1:], None)
        cache[:, :, 1:] = state
        return y, cache

    kernels = causal_conv1d, causal_conv1d_update
    monkeypatch.setattr(module, "convolution_kernels", lambda: kernels)
    monkeypatch.setattr(fla_backend, "kda_kernels", lambda: (None, None, ""))
    monkeypatch.setattr(fla_backend, "FLA_DEVICES", ("cpu",))
    return calls


@pytest.mark.parametrize("T, with_state", [(1, True), (1, False), (2, True), (2, False), (9, True)])
def test_fla_states(pretend_fla, T, with_state):
    x, weight = normal(2, T, 7, dtype=torch.float32), normal(7, 4, seed=1, dtype=torch.float32)
    old = normal(2, 7, 3, seed=2, dtype=torch.float32) if with_state else None
    before = None if old is None else old.clone()
    options = {"initial_state": old, "output_final_state": True}
    expected = short_convolution(x, weight, backend="torch", **options)
    actual = short_convolution(x, weight, **options)
    assert pretend_fla == ["update" if T == 1 and with_state else "conv"]
    assert old is None or torch.equal(old, before)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_state", [True, False])
def test_fla_states_of_packed_sequences(pretend_fla, with_state):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    x = normal(1, sum(LENGTHS), 6, dtype=torch.float32)
    weight = normal(6, 4, seed=1, dtype=torch.float32)
    old = normal(len(LENGTHS), 6, 3, seed=2, dtype=torch.float32) if with_state else None
    options = {"initial_state": old, "output_final_state": True, "cu_seqlens": cu_seqlens}
    expected = short_convolution(x, weight, backend="torch", **options)
    actual = short_convolution(x, weight, **options)
    assert pretend_fla == ["conv"]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_through_a_state_stay_in_torch(pretend_fla):
    x, weight = normal(2, 5, 7, dtype=torch.float32), normal(7, 4, seed=1, dtype=torch.float32)
    old = normal(2, 7, 3, dtype=torch.float32).requires_grad_()
    short_convolution(x, weight, initial_state=old)[0].sum().backward()
    assert not pretend_fla and old.grad is not None
    short_convolution(x.requires_grad_(), weight)[0].sum().backward()
    assert pretend_fla == ["conv"]


def test_what_does_not_fit_is_named():
    x, weight = torch.zeros(2, 5, 6), torch.zeros(6, 1, 4)
    with pytest.raises(ValueError, match=r"initial_state is \(2, 6, 1\); it must be \(2, 6, 3\)"):
        short_convolution(x, weight, initial_state=torch.zeros(2, 6, 1))
    with pytest.raises(ValueError, match=r"weight has shape \(5, 1, 4\); it must be \[6, W\]"):
        short_convolution(x, weight[:5])
