"""KDA on the CPU: formula, recurrence and chunks agree in values, states and gradients."""

import functools
import itertools

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from kda_forms import chunked_kda, recurrent_kda
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear.ops.fla import backend as fla_backend
from kimi_linear.ops.fla.backend import resolve_backend
from kimi_linear.ops.kda import fla as kda_fla
from kimi_linear.ops.kda import kda_attention, segments
from kimi_linear.ops.kda.recurrent import l2norm, log_decay

pytestmark = pytest.mark.kernels

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000)


def make_inputs(
    B=2, T=65, H=3, K=16, V=8, *, num_states=None, dtype=torch.float64, seed=0, gate=1.0
):
    """Raw inputs of `kda_attention`; parameters in float64 or float32, as the dtype asks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "q": normal(B, T, H, K).to(dtype),
        "k": normal(B, T, H, K).to(dtype),
        "v": normal(B, T, H, V).to(dtype),
        "g": (gate * normal(B, T, H, K) - 2).to(dtype),
        "beta": normal(B, T, H).to(dtype),
        "A_log": normal(1, 1, H, 1).to(wide),
        "dt_bias": normal(H * K).to(wide),
        "initial_state": normal(num_states or B, H, K, V).to(wide),
    }
    return inputs


def run(function, inputs, **options):
    """Output and final state."""
    return function(**inputs, output_final_state=True, **options)


def run_with_grads(function, inputs, **options):
    """Output, final state, and the gradients of a random weighing of both, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out, state = run(function, leaves, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (out, state)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": out, "state": state} | {
        f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def assert_all_close(actual, expected, dtype):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], dtype, name)


def to_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


def formula(q, k, v, g, beta, *, A_log, dt_bias, initial_state, output_final_state):
    """The report's equation, with its matrices written out, for one head at a time."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    outputs, states = [], []
    for b, h in itertools.product(range(B), range(H)):
        state = initial_state[b, h]
        bias = dt_bias.reshape(H, K)[h]
        for t in range(T):
            query = q[b, t, h] / (q[b, t, h].square().sum() + 1e-6).sqrt() / K**0.5
            key = k[b, t, h] / (k[b, t, h].square().sum() + 1e-6).sqrt()
            raw = g[b, t, h] + bias
            softplus = torch.logaddexp(torch.zeros_like(raw), raw)
            alpha = torch.diag(torch.exp(-A_log.reshape(H)[h].exp() * softplus))
            rate = 1 / (1 + torch.exp(-beta[b, t, h]))
            erase = torch.eye(K, dtype=q.dtype) - rate * torch.outer(key, key)
            state = erase @ alpha @ state + rate * torch.outer(key, v[b, t, h])
            outputs.append(state.T @ query)
        states.append(state)
    out = torch.stack(outputs).reshape(B, H, T, V).transpose(1, 2)
    return out, torch.stack(states).reshape(B, H, K, V)


@pytest.mark.parametrize("function", [recurrent_kda, chunked_kda, kda_attention])
@pytest.mark.parametrize("T", [1, 5, 17])
def test_formula(function, T):
    inputs = make_inputs(T=T)
    assert_all_close(
        run_with_grads(function, inputs), run_with_grads(formula, inputs), torch.float64
    )


@pytest.mark.parametrize("T", [1, 5, 17])
def test_heads_are_normalised_once(T):
    """A second norm would make short ones longer, which the first leaves shorter than 1."""
    inputs = make_inputs(T=T)
    for name in ("q", "k"):
        inputs[name] *= 1e-3

    def normalised_before(q, k, *others, **kwargs):
        return kda_attention(l2norm(q), l2norm(k), *others, is_normalised=True, **kwargs)

    assert_all_close(
        run_with_grads(normalised_before, inputs), run_with_grads(formula, inputs), torch.float64
    )
    with torch.no_grad():
        found = [
            run(function, inputs, state_out=torch.empty_like(inputs["initial_state"]))
            for function in (normalised_before, kda_attention)
        ]
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("K, V", [(32, 48), (16, 8)])
def test_chunks_are_the_recurrence(T, K, V):
    inputs = make_inputs(T=T, K=K, V=V, gate=2.0)
    with torch.no_grad():
        expected = run(recurrent_kda, inputs)
        actual = run(kda_attention, inputs)
    for name, x, y in zip(("o", "state"), actual, expected, strict=True):
        assert_close(x, y, torch.float64, name)


@pytest.mark.parametrize("T", [1, 2, 17, 65, 200])
def test_chunk_gradients_are_the_recurrence_s(T):
    inputs = make_inputs(T=T, K=32, V=48)
    assert_all_close(
        run_with_grads(chunked_kda, inputs), run_with_grads(recurrent_kda, inputs), torch.float64
    )


def test_many_segments(monkeypatch):
    """Segment borders in tokens and rows: gradients and states pass them."""
    monkeypatch.setattr(segments, "SEGMENT_ELEMENTS", 1)
    inputs = make_inputs(B=3, T=150, H=2)
    assert_all_close(
        run_with_grads(chunked_kda, inputs), run_with_grads(recurrent_kda, inputs), torch.float64
    )


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(wanted):
    inputs = make_inputs(T=70, B=1)
    expected = run_with_grads(recurrent_kda, inputs)[f"d_{wanted}"]
    leaf = inputs[wanted].clone().requires_grad_()
    out, state = run(chunked_kda, inputs | {wanted: leaf})
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, state)]
    loss = (out * weights[0]).sum() + (state * weights[1]).sum()
    assert_close(torch.autograd.grad(loss, leaf)[0], expected, torch.float64, wanted)


def test_gradients_without_states():
    inputs = make_inputs(T=130)
    del inputs["initial_state"]
    grads = []
    for function in (recurrent_kda, chunked_kda):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out, state = function(**leaves)
        assert state is None
        grads.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    for name, actual, expected in zip(inputs, grads[1], grads[0], strict=True):
        assert_close(actual, expected, torch.float64, name)


def test_gradient_of_the_final_state_alone():
    inputs = make_inputs(T=100)
    grads = []
    for function in (recurrent_kda, chunked_kda):
        leaf = inputs["k"].clone().requires_grad_()
        _, state = run(function, inputs | {"k": leaf})
        grads.append(torch.autograd.grad(state.square().sum(), leaf)[0])
    assert_close(grads[1], grads[0], torch.float64)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=5), seed=st.integers(0, 99))
def test_any_split(cuts, seed):
    inputs = make_inputs(T=150, B=1, seed=seed)
    out, final = run(recurrent_kda, inputs)
    state, pieces = inputs["initial_state"], []
    for start, end in itertools.pairwise([0, *sorted(cuts), 150]):
        piece = {name: inputs[name][:, start:end] for name in NAMES[:5]}
        piece |= {"A_log": inputs["A_log"], "dt_bias": inputs["dt_bias"], "initial_state": state}
        part, state = run(kda_attention, piece)
        pieces.append(part)
    assert_close(torch.cat(pieces, dim=1), out, torch.float64)
    assert_close(state, final, torch.float64)


def test_gradients_through_a_split():
    inputs = make_inputs(T=100)

    def in_two(q, k, v, g, beta, *, initial_state, output_final_state, **parameters):
        pieces, state = [], initial_state
        for part in (slice(0, 37), slice(37, None)):
            tensors = [x[:, part] for x in (q, k, v, g, beta)]
            out, state = kda_attention(
                *tensors, initial_state=state, output_final_state=True, **parameters
            )
            pieces.append(out)
        return torch.cat(pieces, dim=1), state

    assert_all_close(
        run_with_grads(in_two, inputs), run_with_grads(recurrent_kda, inputs), torch.float64
    )


PACKINGS = {
    "mixed": [5, 1, 64, 0, 130, 63, 1, 65, 0],
    "singles": [1] * 9,
    "equal": [16] * 12,
    "empty_first": [0, 0, 70],
    "one": [131],
}


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_is_separate(lengths, dtype):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
    inputs = make_inputs(B=1, T=sum(lengths), num_states=len(lengths))

    def separate(q, k, v, g, beta, *, A_log, dt_bias, initial_state, output_final_state):
        pieces, states = [], []
        for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            out, state = recurrent_kda(
                *(x[:, start:end] for x in (q, k, v, g, beta)),
                A_log=A_log,
                dt_bias=dt_bias,
                initial_state=initial_state[n : n + 1],
                output_final_state=True,
            )
            pieces.append(out)
            states.append(state)
        return torch.cat(pieces, dim=1), torch.cat(states)

    expected = run_with_grads(separate, inputs)
    for function in (recurrent_kda, kda_attention):
        actual = run_with_grads(function, inputs, cu_seqlens=cu_seqlens)
        assert_all_close(actual, expected, torch.float64)


@pytest.mark.parametrize("elements", [1, 1 << 19])
def test_packed_without_states(monkeypatch, elements):
    monkeypatch.setattr(segments, "SEGMENT_ELEMENTS", elements)
    lengths = PACKINGS["mixed"]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    inputs = make_inputs(B=1, T=sum(lengths))
    del inputs["initial_state"]
    results = []
    for function in (recurrent_kda, chunked_kda):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out, _ = function(**leaves, cu_seqlens=cu_seqlens)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, torch.float64)


def test_packed_neighbours_never_leak():
    """NaN in one sequence stays there, also past its end, where remainders are padded."""
    cu_seqlens = torch.tensor([0, 70, 75, 80])
    inputs = make_inputs(B=1, T=80, num_states=3)
    clean_out, clean_state = run(kda_attention, inputs, cu_seqlens=cu_seqlens)
    for bad, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        poisoned = {name: x.clone() for name, x in inputs.items()}
        for name in NAMES[:5]:
            poisoned[name][:, start:end] = torch.nan
        out, state = run(kda_attention, poisoned, cu_seqlens=cu_seqlens)
        good = [n for n in range(3) if n != bad]
        torch.testing.assert_close(state[good], clean_state[good])
        torch.testing.assert_close(out[:, :start], clean_out[:, :start])
        torch.testing.assert_close(out[:, end:], clean_out[:, end:])


def test_no_uninitialised_memory():
    """With every fresh buffer full of NaN, nothing changes."""
    cu_seqlens = torch.tensor([0, 70, 70, 75, 80])
    inputs = make_inputs(B=1, T=80, num_states=4)
    expected = run_with_grads(chunked_kda, inputs, cu_seqlens=cu_seqlens)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        assert torch.empty(3).isnan().all()
        actual = run_with_grads(chunked_kda, inputs, cu_seqlens=cu_seqlens)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_all_close(actual, expected, torch.float64)


def test_no_tokens():
    inputs = make_inputs(T=0)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out, state = run(kda_attention, leaves)
    assert out.shape == (2, 0, 3, 8)
    torch.testing.assert_close(state, inputs["initial_state"])
    state.sum().backward()
    assert (leaves["initial_state"].grad == 1).all()


def test_inputs_stay_as_they_are():
    inputs = make_inputs(T=1)
    for T in (1, 70):
        inputs = make_inputs(T=T)
        before = {name: x.clone() for name, x in inputs.items()}
        with torch.inference_mode():
            run(kda_attention, inputs)
        run_with_grads(kda_attention, inputs)
        for name in NAMES:
            assert torch.equal(inputs[name], before[name]), name


def test_strided_inputs():
    """Views of one projection, as a fused layer gives them."""
    inputs = make_inputs(T=70, K=16, V=16)
    fused = torch.cat([inputs[name] for name in "qkvg"], dim=-1)
    views = dict(zip("qkvg", fused.split(16, dim=-1), strict=True))
    expected, actual = run(chunked_kda, inputs), run(chunked_kda, inputs | views)
    assert_close(actual[0], expected[0], torch.float64)
    assert_close(actual[1], expected[1], torch.float64)


# ------------------------------------------------------------------------------------------- decays
@pytest.mark.parametrize("x", [-750.0, -100.0, -20.5, -1e-9, 0.0, 19.5, 20.5, 39.0, 41.0, 700.0])
def test_log_decay_is_exact(x):
    """torch's softplus is wrong by 2e-9 above its default threshold."""
    raw = torch.tensor([[x]], dtype=torch.float64, requires_grad=True)
    decay = log_decay(raw, torch.tensor([0.3], dtype=torch.float64), torch.zeros(1).double())
    zero = torch.zeros_like(raw)
    expected = -torch.tensor(0.3, dtype=torch.float64).exp() * torch.logaddexp(zero, raw)
    torch.testing.assert_close(decay, expected, rtol=1e-13, atol=1e-300)
    (slope,) = torch.autograd.grad(decay.sum(), raw)
    expected = -torch.tensor(0.3, dtype=torch.float64).exp() * raw.detach().sigmoid()
    torch.testing.assert_close(slope, expected, rtol=1e-13, atol=1e-300)


def strong_inputs(kind, dtype, T=150):
    """Gate inputs up to +-100 and rates up to 16: log decays down to -1600 per token."""
    inputs = make_inputs(T=T, K=32, V=24, dtype=dtype)
    inputs["A_log"] = torch.tensor([1.0, 4.0, 16.0], dtype=inputs["A_log"].dtype).log()
    g = inputs["g"]
    if kind == "mixed":
        choices = torch.tensor([-100.0, -20.0, -6.0, -3.0, 0.0, 20.0, 100.0], dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        inputs["g"] = choices[torch.randint(7, g.shape, generator=generator)]
    elif kind == "resets":
        inputs["g"] = torch.full_like(g, -8.0)
        inputs["g"][:, 5::23] = 100.0
    else:
        inputs["g"] = torch.full_like(g, {"strong": 100.0, "none": -100.0}[kind])
    return inputs


@pytest.mark.parametrize("kind", ["strong", "none", "mixed", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_decays(kind, dtype):
    """Finite, and right: exp(-cumulative sum) would overflow after one token."""
    inputs = strong_inputs(kind, dtype)
    expected = run_with_grads(recurrent_kda, to_double(inputs))
    assert_all_close(run_with_grads(chunked_kda, inputs), expected, dtype)


def test_equal_keys_without_decay():
    """The triangular system's worst case: all keys equal, beta 1, no decay."""
    inputs = make_inputs(T=256, dtype=torch.float32)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 30.0)
    inputs["g"] = torch.full_like(inputs["g"], -100.0)
    expected = run_with_grads(recurrent_kda, to_double(inputs))
    actual = run_with_grads(chunked_kda, inputs)
    for name in ("o", "state", "d_q", "d_v", "d_initial_state"):
        assert_close(actual[name], expected[name], torch.float32, name)


def test_zero_queries_and_keys():
    """The norm's epsilon keeps zero vectors, as padding gives them, finite in both directions."""
    inputs = make_inputs(T=70)
    inputs["q"][:, 3:9] = 0
    inputs["k"][:, 5:12] = 0
    assert_all_close(
        run_with_grads(chunked_kda, inputs), run_with_grads(recurrent_kda, inputs), torch.float64
    )


# ------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 17, 300])
def test_dtypes(dtype, T):
    inputs = make_inputs(T=T, K=32, V=24, dtype=dtype)
    actual = run_with_grads(kda_attention, inputs)
    assert actual["o"].dtype == dtype
    assert actual["state"].dtype == torch.float32
    for name in NAMES:
        assert actual[f"d_{name}"].dtype == inputs[name].dtype
    expected = run_with_grads(recurrent_kda, to_double(inputs))
    assert_all_close(actual, expected, dtype)


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(T, dtype):
    inputs = make_inputs(T=T, dtype=dtype)
    expected = run_with_grads(kda_attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_with_grads(kda_attention, inputs)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    """Checkpointing hands saved tensors out once only."""
    inputs = make_inputs(T=130)

    def checkpointed(**leaves):
        names = list(leaves)

        def call(*values):
            return kda_attention(**dict(zip(names, values, strict=True)))

        return torch.utils.checkpoint.checkpoint(
            call, *leaves.values(), use_reentrant=use_reentrant
        )

    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    grads = []
    for function in (recurrent_kda, checkpointed):
        options = {"output_final_state": True}
        out, state = function(**leaves, **options)
        (out.square().sum() + state.sum()).backward()
        grads.append({name: x.grad for name, x in leaves.items()})
        for x in leaves.values():
            x.grad = None
    assert_all_close(grads[1], grads[0], torch.float64)


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("grads", [False, True])
def test_no_chunk_by_chunk_by_key_tensor(monkeypatch, grads):
    """The largest tensor is that of the inputs or two of a segment, never 64 of them."""
    monkeypatch.setattr(segments, "SEGMENT_ELEMENTS", 1 << 14)
    inputs = make_inputs(B=1, T=1024, H=2, K=32, V=24)
    with _LargestTensor() as mode:
        (run_with_grads if grads else run)(chunked_kda, inputs)
    assert mode.largest <= 1024 * 2 * 32


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 64, 3, 16)}, r"k has shape \(2, 64, 3, 16\)"),
        ({"v": torch.zeros(2, 65, 4, 8)}, "v has shape"),
        ({"q": torch.zeros(65, 3, 16)}, "q and v have 3 and 4 axes"),
        ({"beta": torch.zeros(2, 65, 3, 1)}, "beta has shape"),
        ({"A_log": torch.zeros(4)}, "A_log has 4 elements; it must have H = 3"),
        ({"dt_bias": torch.zeros(3)}, r"dt_bias has 3 elements; it must have H \* K = 48"),
        ({"initial_state": torch.zeros(2, 3, 8, 16)}, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 65])}, "the batch size is 2; with cu_seqlens it must be"),
        ({"backend": "triton"}, "backend is 'triton'; allowed are 'auto', 'fla', 'torch'"),
        ({"backend": "fla"}, "backend is 'fla', but the tensor is on 'cpu'"),
    ],
)
def test_errors_name_the_argument(change, message):
    inputs = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        kda_attention(**(inputs | change))


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        torch.tensor([0, 60]),
        torch.tensor([1, 65]),
        torch.tensor([0, 40, 30, 65]),
        torch.tensor([0.0, 65.0]),
        torch.tensor([65]),
        torch.tensor([[0, 65]]),
    ],
)
def test_wrong_cu_seqlens(cu_seqlens):
    inputs = make_inputs(B=1, dtype=torch.float32)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match="cu_seqlens"):
        kda_attention(**inputs, cu_seqlens=cu_seqlens)


# ------------------------------------------------------------ the road to FLA, as far as a CPU sees
def test_cpu_tensors_never_reach_fla(monkeypatch):
    def fail():
        raise AssertionError("fla was looked for")

    monkeypatch.setattr(fla_backend, "kda_kernels", fail)
    assert resolve_backend(torch.zeros(1)) == "torch"
    kda_attention(**make_inputs(T=3))


@pytest.fixture
def pretend_fla(monkeypatch):
    """FLA's two kernels with the constraints they have, computed by the recurrence."""
    calls = []

    def kernel(name, *, scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, **arguments):
        calls.append((name, arguments["cu_seqlens"]))
        assert use_qk_l2norm_in_kernel and use_gate_in_kernel
        if not arguments.pop("use_beta_sigmoid_in_kernel"):
            arguments["beta"] = arguments["beta"].logit()
        assert scale == arguments["q"].shape[-1] ** -0.5
        ends, state = arguments["cu_seqlens"], arguments["initial_state"]
        if ends is not None:
            assert ends.dtype == torch.int64 and (ends.diff() > 0).all()
            assert name == "step" or torch.equal(arguments.pop("cu_seqlens_cpu"), ends)
        if state is not None:
            assert state.dtype == torch.float32 and state.is_contiguous()
        assert arguments["A_log"].shape == arguments["q"].shape[2:3]
        assert arguments["A_log"].dtype == arguments["dt_bias"].dtype == torch.float32
        return recurrent_kda(**arguments)

    kernels = tuple(functools.partial(kernel, name) for name in ("chunk", "step"))
    for module in (fla_backend, kda_fla):
        monkeypatch.setattr(module, "kda_kernels", lambda: (*kernels, ""))
    monkeypatch.setattr(fla_backend, "FLA_DEVICES", ("cpu",))
    return calls


@pytest.mark.parametrize("kernel", ["step", "chunk"])
@pytest.mark.parametrize("with_state", [True, False])
def test_fla_gets_no_empty_sequences(pretend_fla, with_state, kernel):
    T = kda_fla.RECURRENT_TOKENS + (kernel == "chunk")
    cu_seqlens = torch.tensor([0, 0, 5, 5, T, T], dtype=torch.int32)
    inputs = make_inputs(B=1, T=T, V=24, num_states=5, dtype=torch.float32)
    if not with_state:
        inputs["initial_state"] = None
    expected = run(recurrent_kda, inputs, cu_seqlens=cu_seqlens)
    out, state = run(kda_attention, inputs, cu_seqlens=cu_seqlens)
    assert [name for name, _ in pretend_fla] == [kernel]
    assert_close(out, expected[0], torch.float32)
    assert_close(state, expected[1], torch.float32)


def test_fla_state_gradients_around_empty_sequences(pretend_fla):
    cu_seqlens = torch.tensor([0, 0, 5, 5, 12])
    inputs = make_inputs(B=1, T=12, V=24, num_states=4, dtype=torch.float32)
    expected = run_with_grads(recurrent_kda, inputs, cu_seqlens=cu_seqlens)
    actual = run_with_grads(kda_attention, inputs, cu_seqlens=cu_seqlens)
    assert pretend_fla
    assert_all_close(actual, expected, torch.float32)


def test_fla_kernel_by_length_and_gradients(pretend_fla):
    short = kda_fla.RECURRENT_TOKENS
    one, few, more = (make_inputs(T=T, V=24, dtype=torch.float32) for T in (1, short, short + 1))
    for inputs in (one, few, more):
        run(kda_attention, inputs)
    run_with_grads(kda_attention, one)
    with torch.no_grad():
        run(kda_attention, one | {"q": one["q"].clone().requires_grad_()})
    names = [name for name, _ in pretend_fla]
    assert names == ["step", "step", "chunk", "chunk", "step"]


def test_fla_layout_follows_writes_in_place(pretend_fla):
    """FLA caches by identity: one layout, one tensor; another content, another tensor."""
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    inputs = make_inputs(B=1, T=12, V=24, num_states=2, dtype=torch.float32)
    run(kda_attention, inputs, cu_seqlens=cu_seqlens)
    run(kda_attention, inputs, cu_seqlens=cu_seqlens)
    cu_seqlens[1] = 7
    expected = run(recurrent_kda, inputs, cu_seqlens=cu_seqlens)
    actual = run(kda_attention, inputs, cu_seqlens=cu_seqlens)
    first, second, third = (ends for _, ends in pretend_fla)
    assert first is second and second is not third
    torch.testing.assert_close(actual[0], expected[0])


def test_fla_layout_of_what_the_host_knows():
    """Is taken from then on, until the tensor is written to."""
    cu_seqlens = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    layout = fla_backend.prepare_fla_layout(cu_seqlens, cu_seqlens)
    assert fla_backend.fla_layout(cu_seqlens) is layout
    for ends in (layout.filled_ends, layout.host_filled_ends):
        assert ends.tolist() == [0, 5, 12] and ends.dtype == torch.int64
    assert layout.all_ends.tolist() == [0, 5, 5, 12] and layout.filled.tolist() == [0, 2]
    cu_seqlens[1] = 7
    assert fla_backend.fla_layout(cu_seqlens) is not layout


@pytest.mark.parametrize(
    "dtype, K, reason",
    [(torch.float64, 16, "no kernels for torch.float64"), (torch.float32, 264, "head sizes are")],
)
def test_what_fla_cannot_take_goes_to_torch(pretend_fla, dtype, K, reason):
    inputs = make_inputs(T=3, K=K, V=16, dtype=dtype)
    run(kda_attention, inputs)
    assert not pretend_fla
    with pytest.raises(ValueError, match=reason):
        run(kda_attention, inputs, backend="fla")


def test_missing_fla_says_why(monkeypatch):
    monkeypatch.setattr(fla_backend, "FLA_DEVICES", ("cpu",))
    monkeypatch.setattr(fla_backend, "kda_kernels", lambda: (None, None, "ImportError: no triton"))
    assert resolve_backend(torch.zeros(1)) == "torch"
    with pytest.raises(ValueError, match="cannot be imported .ImportError: no triton"):
        resolve_backend(torch.zeros(1), "fla")


def test_no_segment_is_computed_without_sequences():
    for ends in ([0, 64, 128], [0, 70, 134, 200], [0, 0, 3]):
        x = torch.zeros(1, ends[-1], 2, 8)
        found = segments.plan_segments(x, torch.tensor(ends), 8)
        assert found and all(len(segment.rows) > 0 for segment in found)
