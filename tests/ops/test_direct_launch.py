"""Launches of compiled kernels that do not ask Triton which one: the right one, with all arguments.

On a CPU beside a stand-in for Triton, on a GPU beside Triton itself.
"""

import inspect
from dataclasses import dataclass
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
        self.params = [
            SimpleNamespace(name=n, default=d, is_constexpr=n.isupper())
            for n, d in defaults.items()
        ]
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


@dataclass
class Descriptor:
    """As Triton's, which has no hash."""

    base: torch.Tensor
    block_shape: list[int]


def test_descriptors_are_told_apart_by_dtype_and_block(stand_in, monkeypatch):
    monkeypatch.setattr(direct_launch, "TensorDescriptor", Descriptor)
    run = DirectLaunch(stand_in, stand_in.run, chosen=lambda: stand_in.added)
    run(Descriptor(torch.zeros(4, 8), [2, 4]), None, grid=(1,), size=4)
    same = Descriptor(torch.zeros(6, 16), [2, 4])
    assert run(same, None, grid=(1,), size=4).function == "kernel 1"
    (launch,) = stand_in.launches
    assert launch[9] is same
    wide, tall = torch.zeros(4, 8, dtype=torch.float64), [4, 2]
    for number, other in enumerate((Descriptor(wide, [2, 4]), Descriptor(same.base, tall)), 2):
        for _ in range(2):
            assert run(other, None, grid=(1,), size=4).function == f"kernel {number}"
            assert stand_in.searches == number


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
        {"size": 16},  # a multiple of 16
        {"size": 1},
        {"size": 0},
        {"size": 1 << 31},  # no longer in 32 bits
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


def test_numbers_of_a_kind_share_a_kernel(stand_in):
    """But for those by which it is chosen; each launch has its own."""
    run = DirectLaunch(stand_in, stand_in.run, chosen=lambda: stand_in.added)
    x = torch.zeros(4)
    for sizes, kernel in (((4, 5, 999), "kernel 1"), ((16, 4096), "kernel 2")):
        for size in sizes:
            assert run(x, x, size, grid=(1,)).function == kernel
    assert [launch[11] for launch in stand_in.launches] == [5, 999, 4096]
    run = DirectLaunch(stand_in, stand_in.run, lambda: stand_in.added, by_value=["size"])
    for size in (4, 5, 5):
        run(x, x, grid=(1,), size=size)
    assert stand_in.searches == 4


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

    @triton.jit
    def _copy_tile(source, target, SIZE: tl.constexpr):
        place = tl.arange(0, SIZE)
        value = source.load([tl.program_id(0) * SIZE, 0])
        tl.store(target + (tl.program_id(0) * SIZE + place)[:, None] * SIZE + place[None, :], value)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    """Sizes, dtypes and alignments in turn: always Triton's result, and Triton asked once of
    each but for sizes of a kind."""
    function, searches = launch_directly(_shift), []
    run = function.run._run
    function.run._run = lambda *args, **kwargs: searches.append(1) or run(*args, **kwargs)
    sources = [torch.randn(65, device="cuda", dtype=each) for each in (torch.float32, torch.half)]
    cases = [
        (source, start, size, scale)
        for source in (*sources, None)
        for start in (0, 1)
        for size in (1, 16, 48, 37, 39)
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
    assert len(searches) == 3 * 2 * (2 * 2 + 1)


@pytest.mark.gpu
def test_descriptors_on_a_gpu():
    """Other tensors of other sizes, by the kernel of the first."""
    if direct_launch.TensorDescriptor is None or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs hardware that copies tiles")
    function, searches = launch_directly(_copy_tile), []
    run = function.run._run
    function.run._run = lambda *args, **kwargs: searches.append(1) or run(*args, **kwargs)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for shape in ((32, 32), (64, 48), (128, 32)):
            source = torch.randn(shape, device="cuda").to(dtype)
            target = torch.zeros(shape[0], 32, device="cuda", dtype=dtype)
            tiles = direct_launch.TensorDescriptor.from_tensor(source, [32, 32])
            function[(shape[0] // 32,)](tiles, target, SIZE=32)
            assert torch.equal(target, source[:, :32])
    assert len(searches) == 2
