"""FLA's kernels against the recurrence in float64, its convolution against torch's: on a GPU."""

import itertools

import pytest
import torch
from kda_forms import chunked_kda, recurrent_kda
from tolerance import assert_close, assert_kernel_close

from kimi_linear.ops.fla.backend import resolve_backend
from kimi_linear.ops.kda import kda_attention
from kimi_linear.ops.short_conv.convolution import short_convolution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
DTYPES = [torch.bfloat16, torch.float16]
PACKING = [63, 1, 64, 0, 65, 130, 0, 1, 300]


@pytest.fixture(autouse=True)
def _needs_fla():
    pytest.importorskip("fla.ops.kda")


def make_inputs(T, *, B=2, H=3, K=64, V=64, num_states=None, dtype=torch.bfloat16, seed=0):
    """Raw inputs on the GPU: activations in dtype, parameters and states in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).cuda()

    return {
        "q": normal(B, T, H, K).to(dtype),
        "k": normal(B, T, H, K).to(dtype),
        "v": normal(B, T, H, V).to(dtype),
        "g": (normal(B, T, H, K) - 2).to(dtype),
        "beta": normal(B, T, H).to(dtype),
        "A_log": normal(1, 1, H, 1) * 0.5,
        "dt_bias": normal(H * K) * 0.5,
        "initial_state": normal(num_states or B, H, K, V) * 0.2,
    }


def to_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


def run_with_grads(function, inputs, **options):
    """Output, final state, and the gradients of a fixed random weighing of both, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out, state = function(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).cuda() for x in (out, state)]
    loss = (out.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": out, "state": state} | {
        f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def assert_all_kernel_close(actual, expected, dtype):
    assert actual.keys() == expected.keys()
    for name in expected:
        # one number per head, a sum of both signs over all tokens and channels
        excess = 2 if name == "d_A_log" else 1
        assert_kernel_close(actual[name], expected[name], dtype, name, excess=excess)


def test_auto_is_fla():
    inputs = make_inputs(5)
    assert resolve_backend(inputs["q"], head_dims=(64, 64)) == "fla"
    assert resolve_backend(inputs["q"].double(), head_dims=(64, 64)) == "torch"
    assert resolve_backend(inputs["q"].cpu(), head_dims=(64, 64)) == "torch"
    with pytest.raises(ValueError, match="no kernels for torch.float64"):
        kda_attention(**to_double(inputs), backend="fla")


def test_torch_path_on_the_gpu():
    """What the FLA path is compared with is itself right there."""
    inputs = to_double(make_inputs(150, K=32, V=48))
    expected = run_with_grads(recurrent_kda, inputs)
    for function in (chunked_kda, kda_attention):
        actual = run_with_grads(function, inputs)
        for name in expected:
            assert_close(actual[name], expected[name], torch.float64, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("size", [64, 128])
def test_values_and_states(dtype, T, size):
    inputs = make_inputs(T, K=size, V=size, dtype=dtype)
    with torch.no_grad():
        expected = recurrent_kda(**to_double(inputs), output_final_state=True)
        actual = kda_attention(**inputs, output_final_state=True, backend="fla")
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    for name, x, y in zip(("o", "state"), actual, expected, strict=True):
        assert_kernel_close(x, y, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("size", [64, 128])
def test_gradients(dtype, T, size):
    """Against the chunked form in float64, which equals the recurrence to 1e-10."""
    inputs = make_inputs(T, K=size, V=size, dtype=dtype)
    expected = run_with_grads(chunked_kda, to_double(inputs))
    assert_all_kernel_close(run_with_grads(kda_attention, inputs, backend="fla"), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128])
def test_long(dtype, size):
    inputs = make_inputs(8192, B=1, H=2, K=size, V=size, dtype=dtype)
    with torch.no_grad():
        out, state = recurrent_kda(**to_double(inputs), output_final_state=True)
    expected = run_with_grads(chunked_kda, to_double(inputs))
    assert_close(expected["o"], out, torch.float64, "o")
    assert_close(expected["state"], state, torch.float64, "state")
    assert_all_kernel_close(run_with_grads(kda_attention, inputs, backend="fla"), expected, dtype)


def test_float32():
    """fp32 inputs on FLA's kernels, whose products may be in TF32."""
    inputs = make_inputs(200, dtype=torch.float32)
    expected = run_with_grads(chunked_kda, to_double(inputs))
    actual = run_with_grads(kda_attention, inputs, backend="fla")
    assert_all_kernel_close(actual, expected, torch.float32)


def test_keys_and_values_of_different_size():
    inputs = make_inputs(130, K=64, V=128)
    expected = run_with_grads(chunked_kda, to_double(inputs))
    actual = run_with_grads(kda_attention, inputs, backend="fla")
    assert_all_kernel_close(actual, expected, torch.bfloat16)


def test_without_initial_state():
    inputs = make_inputs(130)
    del inputs["initial_state"]
    expected = run_with_grads(chunked_kda, to_double(inputs))
    actual = run_with_grads(kda_attention, inputs, backend="fla")
    assert_all_kernel_close(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed(dtype, size, index_dtype):
    """Lengths 0 and 1 among others; empty sequences hand their state and its gradient through."""
    ends = torch.tensor([0, *itertools.accumulate(PACKING)], dtype=index_dtype).cuda()
    inputs = make_inputs(sum(PACKING), B=1, K=size, V=size, num_states=len(PACKING), dtype=dtype)
    expected = run_with_grads(chunked_kda, to_double(inputs), cu_seqlens=ends)
    actual = run_with_grads(kda_attention, inputs, cu_seqlens=ends, backend="fla")
    assert_all_kernel_close(actual, expected, dtype)
    empty = [n for n, length in enumerate(PACKING) if length == 0]
    assert torch.equal(actual["state"][empty], inputs["initial_state"][empty])


def test_packed_layouts_change():
    """FLA keeps chunk indices by the identity of cu_seqlens; a refreshed buffer is another one."""
    inputs = make_inputs(200, B=1, num_states=2)
    ends = torch.tensor([0, 70, 200], device="cuda")
    for cut in (70, 130, 1):
        ends[1] = cut
        with torch.no_grad():
            expected = chunked_kda(**to_double(inputs), output_final_state=True, cu_seqlens=ends)
            actual = kda_attention(**inputs, output_final_state=True, cu_seqlens=ends)
        for name, x, y in zip(("o", "state"), actual, expected, strict=True):
            assert_kernel_close(x, y, torch.bfloat16, name)


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_a_split_and_single_steps(cut):
    """Prefill, then steps of one token by the recurrent kernel."""
    inputs = make_inputs(110)
    with torch.no_grad():
        expected = recurrent_kda(**to_double(inputs), output_final_state=True)
        state, pieces = inputs["initial_state"], []
        borders = [0, cut, *range(101, 111)] if cut == 100 else [0, cut, 110]
        for start, end in itertools.pairwise(borders):
            tokens = {name: inputs[name][:, start:end] for name in NAMES[:5]}
            parameters = {name: inputs[name] for name in ("A_log", "dt_bias")}
            before = state.clone()
            out, new_state = kda_attention(
                **tokens, **parameters, initial_state=state, output_final_state=True, backend="fla"
            )
            assert torch.equal(state, before), "the given state was written to"
            state = new_state
            pieces.append(out)
    assert_kernel_close(torch.cat(pieces, dim=1), expected[0], torch.bfloat16, "o")
    assert_kernel_close(state, expected[1], torch.bfloat16, "state")


@pytest.mark.parametrize("gate", [-100.0, 100.0])
def test_strong_gates_are_finite(gate):
    inputs = make_inputs(150)
    inputs["g"] = torch.full_like(inputs["g"], gate)
    inputs["A_log"] = torch.full_like(inputs["A_log"], 2.77)
    with torch.no_grad():
        expected = chunked_kda(**to_double(inputs), output_final_state=True)
        actual = kda_attention(**inputs, output_final_state=True, backend="fla")
    for name, x, y in zip(("o", "state"), actual, expected, strict=True):
        assert_kernel_close(x, y, torch.bfloat16, name)


# ------------------------------------------------------------------------------- short convolution
def conv_inputs(T, *, B=2, D=192, W=4, dtype=torch.bfloat16, num_states=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator).to(dtype).cuda()
    weight = (torch.randn(D, 1, W, generator=generator) * 0.5).to(dtype).cuda()
    state = torch.randn(num_states or B, D, W - 1, generator=generator).to(dtype).cuda()
    return x, weight, state


def both(x, weight, **options):
    """The FLA path, and the torch path in float64."""
    wide = {
        k: v.double() if k == "initial_state" and v is not None else v for k, v in options.items()
    }
    with torch.no_grad():
        actual = short_convolution(x, weight, output_final_state=True, backend="fla", **options)
        expected = short_convolution(
            x.double(), weight.double(), output_final_state=True, backend="torch", **wide
        )
    return actual, expected


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 63, 65, 1000])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolution(dtype, T, with_state, activation):
    x, weight, state = conv_inputs(T, dtype=dtype)
    old = state if with_state else None
    before = state.clone()
    (y, new), (expected, expected_new) = both(x, weight, activation=activation, initial_state=old)
    assert y.dtype == new.dtype == dtype and new.is_contiguous()
    assert torch.equal(state, before), "the given state was written to"
    assert_close(y, expected, dtype, "y")
    assert torch.equal(new.double(), expected_new)


@pytest.mark.parametrize("with_state", [True, False])
def test_packed_convolution(with_state):
    lengths = [5, 1, 0, 2, 64, 3, 0, 130]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).cuda()
    x, weight, state = conv_inputs(sum(lengths), B=1, num_states=len(lengths))
    (y, new), (expected, expected_new) = both(
        x, weight, initial_state=state if with_state else None, cu_seqlens=ends
    )
    assert_close(y, expected, torch.bfloat16, "y")
    assert torch.equal(new.double(), expected_new)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("T", [1, 3, 200])
def test_convolution_gradients(packed, T):
    x, weight, _ = conv_inputs(T, B=1 if packed else 2)
    ends = torch.tensor([0, 1, T], device="cuda") if packed else None
    grads = []
    for dtype, backend in ((torch.bfloat16, "fla"), (torch.float64, "torch")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        y, state = short_convolution(
            *leaves, output_final_state=True, cu_seqlens=ends, backend=backend
        )
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator).cuda() for t in (y, state)]
        loss = (y.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for name, actual, expected in zip(("x", "weight"), *grads, strict=True):
        assert_kernel_close(actual, expected, torch.bfloat16, name)
