"""Launches of compiled kernels that do not ask Triton which one: the right one, with all arguments.

On a CPU beside a stand-in for Triton, on a GPU beside Triton itself.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

from kimi_linear.ops import launch as direct_launch
from kimi_linear.ops.launch import DirectLaunch, launch_directly

pytestmark = pytest.mark.kernels

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class StandIn:
    """A jit function (x, y, size, SCALE=2, BLOCK) and Triton's run of it, which counts itself; its
    kernels keep what they are launched with."""

    def __init__(self):
        empty = inspect.Parameter.empty
        defaults = {"x": empty, "y": empty, "size": empty, "SCALE": 2, "BLOCK": empty}
        self.params = [SimpleNamespace(name=n, default=d) for n, d in defaults.items()]
        self.pre_run_hooks = []
        self.searches, self.launches = 0, []

    def run(self, *args, grid, warmup, **kwargs):
        self.searches += 1
        self.added = {"BLOCK": 64}
        return SimpleNamespace(
            run=lambda *launch: self.launches.append(launch),
            function=f"kernel {self.searches}",
            packed_metadata="metadata",
        )


@pytest.fixture
def stand_in(monkeypatch):
    active = SimpleNamespace(device=0)
    active.get_current_device = lambda: active.device
    active.get_current_stream = lambda device: f"stream {device}"
    runtime = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[])
    )
    monkeypatch.setattr(direct_launch, "driver", SimpleNamespace(active=active), raising=False)
    monkeypatch.setattr(direct_launch, "knobs", SimpleNamespace(runtime=runtime), raising=False)
    function = StandIn()
    function.active, function.runtime = active, runtime
    return function


class Descriptor:
    """As Triton's, has no hash."""

    __hash__ = None


def test_descriptors_take_tritons_own_way(stand_in):
    direct, x = DirectLaunch(stand_in, stand_in.run, lambda: stand_in.added), torch.zeros(4)
    for number in (1, 2):
        kernel = direct(x, Descriptor(), 3, grid=(1,))
        assert kernel.function == f"kernel {number}" and stand_in.launches == []


def test_a_second_launch_is_direct(stand_in):
    """With the same kernel, this launch's tensors and grid, defaults and what was chosen."""
    run = DirectLaunch(stand_in, stand_in.run, chosen=lambda: stand_in.added)
    x, y = torch.zeros(4), torch.ones(4)
    for grid in ((7,), (7, 3), lambda given: (given["BLOCK"], given["size"])):
        run(torch.empty(4), y, grid=(1,), size=4)
        stand_in.launches.clear()
        assert run(x, y, grid=grid, size=4).function == "kernel 1"
        (launch,) = stand_in.launches
        wanted = {1: (7, 1, 1), 2: (7, 3, 1)}[len(grid)] if isinstance(grid, tuple) else (64, 4, 1)
        assert launch[:9] == (*wanted, "stream 0", "kernel 1", "metadata", None, None, None)
        assert launch[9] is x and launch[10] is y
        assert launch[11:] == (4, 2, 64)
    assert stand_in.searches == 1


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(4, dtype=torch.bfloat16)},
        {"x": torch.zeros(5)[1:]},  # no longer aligned to 16 bytes
        {"x": None},
        {"size": 5},
        {"SCALE": 3},
        {"num_warps": 8},
        {"device": 1},
    ],
    ids=str,
)
def test_what_differs_is_another_kernel(stand_in, other):
    run = DirectLaunch(stand_in, stand_in.run, chosen=lambda: stand_in.added)
    plain = {"x": torch.zeros(4), "y": torch.zeros(4), "size": 4}
    run(grid=(1,), **plain)
    stand_in.active.device = other.get("device", 0)
    other = {name: value for name, value in other.items() if name != "device"}
    for searches in (2, 2):
        assert run(grid=(1,), **{**plain, **other}).function == "kernel 2"
        assert stand_in.searches == searches


@pytest.mark.parametrize("listener", ["launch_enter_hook", "launch_exit_hook", "pre_run", "warmup"])
def test_triton_launches_where_somebody_listens(stand_in, listener):
    run = DirectLaunch(stand_in, stand_in.run)
    if listener == "pre_run":
        stand_in.pre_run_hooks.append(print)
    elif listener != "warmup":
        getattr(stand_in.runtime, listener).calls.append(print)
    for count in (1, 2):
        run(None, None, grid=(1,), warmup=listener == "warmup", size=4, BLOCK=64)
        assert stand_in.searches == count


def test_a_choice_that_may_not_be_kept_is_made_each_time(stand_in):
    run = DirectLaunch(stand_in, stand_in.run, chosen=lambda: None)
    for count in (1, 2):
        run(None, None, grid=(1,), size=4)
        assert stand_in.searches == count


def test_memory_is_bounded(stand_in, monkeypatch):
    monkeypatch.setattr(direct_launch, "MAX_KERNELS", 3)
    run = DirectLaunch(stand_in, stand_in.run)
    for size in range(10):
        run(None, None, grid=(1,), size=size, BLOCK=64)
        assert 0 < len(run._kernels) <= 3


def test_what_is_not_tritons_stays_as_it_is():
    def function():
        pass

    assert launch_directly(function) is function


if triton is not None:

    @triton.jit
    def _shift(x, y, size, SCALE: tl.constexpr = 2, BLOCK: tl.constexpr = 16):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = 0.0
        if x is not None:
            value = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
        tl.store(y + place, (value * SCALE + size).to(y.dtype.element_ty), mask=place < size)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    """Sizes, dtypes and alignments in turn: always Triton's result, and Triton asked once of
    each."""
    function, searches = launch_directly(_shift), []
    run = function.run._run
    function.run._run = lambda *args, **kwargs: searches.append(1) or run(*args, **kwargs)
    sources = [torch.randn(65, device="cuda", dtype=each) for each in (torch.float32, torch.half)]
    cases = [
        (source, start, size, scale)
        for source in (*sources, None)
        for start in (0, 1)
        for size in (1, 16, 37)
        for scale in (2, 5)
    ]
    for _ in range(3):
        for source, start, size, scale in cases:
            x = None if source is None else source[start:]
            out = torch.zeros(64, device="cuda")
            function[(triton.cdiv(size, 16),)](x, out, size, SCALE=scale)
            wanted = torch.zeros(64, device="cuda")
            wanted[:size] = size if x is None else x[:size].float() * scale + size
            # a product and a sum may be rounded once
            torch.testing.assert_close(out, wanted)
    # without a source there is no start
    assert len(searches) == len(cases) - 6
