"""Parameters that are replaced as they arrive from a checkpoint, each before the next one is read.

Whoever reads a checkpoint puts each parameter into its module by `setattr`; the modules' classes
are exchanged meanwhile for some that take that chance.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kimi_linear.ops.quantized import QuantizedTensor
from kimi_linear.upstream.models import mark_initialized

Replace = Callable[[Tensor], nn.Parameter]


@contextmanager
def replacing_arrivals(
    places: Mapping[nn.Module, Mapping[str, Replace]], *, frees: bool = False
) -> Iterator[None]:
    """Within, what is put into these modules is replaced.

    Args:
        places: By module, names of parameters, and what makes the new one of the one that arrived.
        frees: Whether the memory of what arrived is freed at once. Transformers holds a tensor
            until it has read the next one. Only for tensors that share memory with nothing else.
    """
    kinds: dict[type, type] = {}

    def arriving(kind: Any) -> type:
        class Arriving(kind):
            """A module that replaces what is put into it."""

            def __setattr__(self, name: str, value: Any) -> None:
                replace = places[self].get(name)
                is_plain = isinstance(value, Tensor) and not isinstance(value, QuantizedTensor)
                if replace is not None and is_plain and not value.is_meta:
                    arrived, value = value, replace(value)
                    mark_initialized(value)
                    storage = arrived.untyped_storage()
                    if frees and storage.resizable():
                        storage.resize_(0)
                super().__setattr__(name, value)

        return Arriving

    before = {module: module.__class__ for module in places}
    for module, kind in before.items():
        if kind not in kinds:
            kinds[kind] = arriving(kind)
        module.__class__ = kinds[kind]
    try:
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind
