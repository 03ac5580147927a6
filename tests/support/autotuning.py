"""Less of Triton's autotuning."""

from typing import Any

AUTOTUNE_CONFIGS = 2


def try_few_autotune_configs() -> None:
    """Let Triton's autotuners choose between two configurations instead of dozens.

    Which one is chosen changes a kernel's speed, not its result; compiling all of them for every
    size and dtype takes the better part of an hour on a fresh machine.
    """
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return
    original = Autotuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: list[Any], *args: Any, **kw: Any) -> None:
        original(self, fn, arg_names, configs[:AUTOTUNE_CONFIGS], *args, **kw)

    Autotuner.__init__ = init
