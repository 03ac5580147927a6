"""Fewer choices for Triton's autotuners."""

import importlib.util
from typing import Any

from options.settings import require


def limit_autotuning(count: int, share: tuple[int, int] = (0, 1)) -> None:
    """Let Triton's autotuners choose among their first `count` configurations; 0: among all.

    Compiling them all takes minutes in a new process, and which one is chosen changes a kernel's
    speed only. It has to be called before FLA is imported.

    Args:
        count: How many.
        share: (i, n): of these only every n-th from the i-th on, but at least one. Processes beside
            each other compile all of them so, for those that come after.

    Raises:
        ValueError: For a negative number.
    """
    require(count >= 0, "autotune", count, "0 (all) or the number of configurations")
    is_all = count == 0 and share == (0, 1)
    if is_all or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.autotuner import Autotuner

    original = getattr(Autotuner, "_all_configs_init", Autotuner.__init__)

    def init(self: Any, fn: Any, arg_names: Any, configs: list[Any], *args: Any, **kw: Any) -> None:
        first = configs[: count or None]
        chosen = first[share[0] :: share[1]] or first[:1]
        original(self, fn, arg_names, chosen, *args, **kw)

    Autotuner._all_configs_init = original
    Autotuner.__init__ = init
