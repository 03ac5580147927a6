"""Tensors that are made when `save_pretrained` writes them, shard by shard.

It asks a tensor for its storage's address and size, to divide them among files and to find those
that share memory, and for `contiguous()` right before it writes a file; it has since 5.17.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class DeferredTensor(Tensor):
    """A tensor on the CPU that is not there until it is used."""

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> "DeferredTensor":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=torch.device("cpu")
        )
        made.make = make
        return made

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        """The tensor itself, on the CPU."""
        found = self.make().cpu().contiguous()
        assert found.shape == self.shape and found.dtype == self.dtype
        return found

    def untyped_storage(self) -> Any:
        """A storage of its own."""
        return _Storage(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(DeferredTensor, cls.contiguous, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Storage:
    """What is asked of a storage."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def data_ptr(self) -> int:
        """A number that no other tensor has."""
        return id(self.tensor)

    def nbytes(self) -> int:
        return self.tensor.nelement() * self.tensor.element_size()
