"""Launches compiled Triton kernels without working out anew which ones they are.

For every launch Triton binds the arguments, derives a type and a specialisation of each, and makes
a key of strings by which it finds the kernel: two to three times as long as the launch itself takes
the host, and a training step has some hundred launches. Here a kernel is found by what that
depends on: dtype and alignment of tensors, dtype and block of tensor descriptors, of numbers such
as lengths of texts whether 16 divides them, values of all else, and the device.

Triton's own way is taken for what is new, in the interpreter, and where somebody listens to
launches (profilers such as Proton, hooks of kernels).
"""

import inspect
import operator
import threading
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

try:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
except ImportError:  # no triton, or one before 3.4
    JITFunction = driver = None

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no triton, or an old one
    TensorDescriptor = None

TENSORS = frozenset({Tensor, nn.Parameter})
MAX_KERNELS = 1024  # remembered of one function
# Integers from here on are passed in 64 bits, others in 32.
WIDE = 1 << 31


def launch_directly(function: Any) -> Any:
    """A `triton.jit` function whose later launches are direct; anything else as it is."""
    if is_jit_function(function):
        function.run = DirectLaunch(function, function.run)
    return function


def is_jit_function(function: Any) -> bool:
    """Whether it is one of Triton's, compiled and not interpreted."""
    return JITFunction is not None and isinstance(function, JITFunction)


class DirectLaunch:
    """In the place of a `run` of Triton's: of a jit function, or of an autotuner around one."""

    def __init__(
        self,
        function: Any,
        run: Callable[..., Any],
        chosen: Callable[[], dict[str, Any] | None] = dict,
        by_value: Collection[str] = (),
    ) -> None:
        """
        Args:
            function: the jit function.
            run: what is called for arguments that are new; returns the compiled kernel.
            chosen: the parameters that `run` has added to those it was given; None if it must be
                called in any case.
            by_value: names of parameters whose values `run` looks at to choose.
        """
        parameters = function.params
        self._numbers = {each.name for each in parameters if not each.is_constexpr} - {*by_value}
        self._names = [parameter.name for parameter in parameters]
        self._defaults = {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not inspect.Parameter.empty
        }
        self._function, self._run, self._chosen = function, run, chosen
        self._kernels: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if warmup or _has_listeners(self._function):
            return self._run(*args, grid=grid, warmup=warmup, **kwargs)
        active = driver.active
        device = active.get_current_device()
        given, numbers = (*args, *kwargs.values()), self._numbers
        names = *self._names[: len(args)], *kwargs
        key = (
            device,
            *kwargs,
            *[
                (value.dtype, value.data_ptr() & 15)
                if (kind := type(value)) in TENSORS
                else (value.base.dtype, tuple(value.block_shape))
                if kind is TensorDescriptor
                else (value & 15 == 0,)  # 1, and what is below, are kernels of their own
                if kind is int and 1 < value < WIDE and name in numbers
                else value
                for name, value in zip(names, given, strict=True)
            ],
        )
        found = self._kernels.get(key)
        if found is None:
            return self._search(key, args, grid, kwargs)
        kernel, launch, function, metadata, added, pick = found
        values = pick(given + added)
        if callable(grid):
            grid = grid(dict(zip(self._names, values, strict=True)))
        x, y, z = (*tuple(grid), 1, 1)[:3]
        stream = active.get_current_stream(device)
        launch(x, y, z, stream, function, metadata, None, None, None, *values)
        return kernel

    def _search(self, key: Any, args: Any, grid: Any, kwargs: Any) -> Any:
        with self._lock:  # of two threads that search, each reads its own choice
            kernel = self._run(*args, grid=grid, warmup=False, **kwargs)
            chosen = self._chosen()
        is_other = len(self._names) < 2 or any(isinstance(each, Tensor) for each in key)
        if kernel is None or chosen is None or is_other:
            return kernel
        if len(self._kernels) >= MAX_KERNELS:
            self._kernels.clear()
        added = {**self._defaults, **chosen}
        # where in arguments and what is added to them each parameter is found
        names = [*self._names[: len(args)], *kwargs, *added]
        pick = operator.itemgetter(*map(names.index, self._names))
        found = kernel, kernel.run, kernel.function, kernel.packed_metadata
        self._kernels[key] = *found, tuple(added.values()), pick
        return kernel


def _has_listeners(function: Any) -> bool:
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # None, a function, or since Triton 3.5 a chain of them
    return bool(
        function.pre_run_hooks
        or (enter and getattr(enter, "calls", True))
        or (leave and getattr(leave, "calls", True))
    )
