"""Weights in 3, 4 or 8 bits, in a parameter's place.

Shapes: N outputs, K inputs, W words of a row, G groups of a row, R rows that share a scale, P
scales (or zeros) of neighbouring groups that fill 32 bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import DeviceLikeType

from kimi_linear.ops.packed.codes import PLANES, pack, unpack
from kimi_linear.ops.packed.unpacking import can_unpack, unpack_on_gpu
from kimi_linear.ops.quantized import QuantizedTensor, TransposedWeights
from kimi_linear.ops.runtime import ceil_div, is_traced, product_dtype
from kimi_linear.schemes import Scheme

aten = torch.ops.aten
# Bytes of a linear layer's weights that are written out at once, where no graph is recorded: those
# of the 48B model's head take 755 MB.
WRITTEN_BYTES = 128 << 20


class PackedWeights(QuantizedTensor):
    """A frozen tensor [.., N, K] held in few bits; computations see it in its dtype.

    Attributes:
        planes: Codes in the order of `codes.py`, each [.., N, W].
        scale: [.., G / P, N / R, P], of a floating dtype: kernels load 32 bits.
        zero: int16, alike; None if codes are symmetric or floats.
        scheme: How it is held.
    """

    is_indexable = True
    planes: tuple[Tensor, ...]
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme

    @staticmethod
    def __new__(
        cls,
        planes: tuple[Tensor, ...],
        scale: Tensor,
        zero: Tensor | None,
        scheme: Scheme,
        num_inputs: int,
        dtype: torch.dtype,
    ) -> "PackedWeights":
        shape = (*planes[0].shape[:-1], num_inputs)
        _check_parts(planes, scale, zero, scheme, shape)
        made = cls.wrap(shape, dtype, planes[0].device)
        made.planes, made.scale, made.zero, made.scheme = tuple(planes), scale, zero, scheme
        return made

    @classmethod
    def of_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype,
    ) -> "PackedWeights":
        """From codes uint8 [.., N, K], and scale and zero [.., N / R, G] as checkpoints have them.

        Raises:
            ValueError: For parts that do not fit each other.
        """
        zero = None if zero is None else _to_words(zero.to(torch.int16))
        return cls(pack(codes, scheme), _to_words(scale), zero, scheme, codes.shape[-1], dtype)

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype, device: DeviceLikeType
    ) -> "PackedWeights":
        """Of a shape [.., N, K], to be filled by `fill`."""
        *outer, rows, num_inputs = shape
        words = scheme.num_words(num_inputs)
        planes = tuple(
            torch.empty(*outer, rows, words, dtype=kind, device=device)
            for kind, _ in PLANES[scheme.bits]
        )
        sizes = _group_shape(scheme, shape, dtype)
        scale, zero = torch.empty(sizes, dtype=dtype, device=device), None
        if not scheme.is_symmetric:
            sizes = _group_shape(scheme, shape, torch.int16)
            zero = torch.empty(sizes, dtype=torch.int16, device=device)
        return cls(planes, scale, zero, scheme, num_inputs, dtype)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold it, by name."""
        named = {f"plane_{i}": plane for i, plane in enumerate(self.planes)}
        zero = {} if self.zero is None else {"zero": self.zero}
        return {**named, "scale": self.scale, **zero}

    def fill(self, index: Any, source: "PackedWeights") -> None:
        """Write `source` in the place of `self[index]`: an expert by its number, or a pair of it
        and a slice of rows."""
        expert, rows = index if isinstance(index, tuple) else (index, slice(None))
        if source.scheme != self.scheme:
            raise ValueError(f"{source.scheme} is not allowed: it must be {self.scheme}")
        start, stop, _ = rows.indices(self.shape[-2])
        columns = slice(start // self.scheme.rows, ceil_div(stop, self.scheme.rows))
        for mine, other in zip(self.planes, source.planes, strict=True):
            mine[expert, rows].copy_(other)
        self.scale[expert, :, columns].copy_(source.scale)
        if self.zero is not None:
            assert source.zero is not None
            self.zero[expert, :, columns].copy_(source.zero)

    def scales(self) -> Tensor:
        """[.., N / R, G], as checkpoints have them."""
        return _from_words(self.scale, self.scheme.num_groups(self.shape[-1]))

    def zeros(self) -> Tensor | None:
        """[.., N / R, G], or None."""
        if self.zero is None:
            return None
        return _from_words(self.zero, self.scheme.num_groups(self.shape[-1]))

    def codes(self) -> Tensor:
        """uint8 [.., N, K]."""
        return unpack(self.planes, self.scheme, self.shape[-1])

    def dequantized(self) -> Tensor:
        """[.., N, K] of its dtype, a plain tensor: (code - zero) * scale, rounded once."""
        if can_unpack(self):
            return unpack_on_gpu(self)
        if self.dim() > 2:  # one by one: the wide codes of one matrix, not of all
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            for i in range(self.shape[0]):
                out[i] = self[i].dequantized()  # type: ignore[attr-defined]
            return out
        scheme, codes = self.scheme, self.codes()
        scale, zero = self.scales(), self.zeros()
        wide = torch.promote_types(self.dtype, torch.float32)
        if scheme.is_float:
            values = codes.view(torch.float8_e4m3fn).to(wide)
        elif zero is None:
            values = codes.to(wide) - scheme.middle
        else:
            values = codes.to(wide) - self._spread(zero.to(wide))
        return (values * self._spread(scale.to(wide))).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`, for memory's sake by some of a large matrix's outputs at a time."""
        num_outputs, num_inputs = self.shape
        shared = self.scheme.rows
        step = WRITTEN_BYTES // (num_inputs * self.dtype.itemsize) // shared * shared
        step = max(step, shared)
        if step >= num_outputs or is_traced():
            return super().linear(x, bias)
        out = x.new_empty(*x.shape[:-1], num_outputs, dtype=product_dtype(x))
        for start in range(0, num_outputs, step):
            some = slice(start, start + step)
            out[..., some] = F.linear(x, self._outputs(some).dequantized())
        return out if bias is None else out.add_(bias)

    def _outputs(self, some: slice) -> "PackedWeights":
        """Those of a matrix; the first is the first that shares its scale."""
        shared = slice(some.start // self.scheme.rows, ceil_div(some.stop, self.scheme.rows))
        planes = tuple(plane[some] for plane in self.planes)
        scale = self.scale[:, shared].contiguous()
        zero = None if self.zero is None else self.zero[:, shared].contiguous()
        return PackedWeights(planes, scale, zero, self.scheme, self.shape[-1], self.dtype)

    def _spread(self, each: Tensor) -> Tensor:
        """[N / R, G] to what multiplies [N, K]."""
        rows, num_inputs = self.shape[-2:]
        if self.scheme.rows > 1:
            each = each.repeat_interleave(self.scheme.rows, dim=0)[:rows]
        if self.scheme.group is None:
            return each
        return each.repeat_interleave(self.scheme.group, dim=1)[:, :num_inputs]

    def data_ptr(self) -> int:
        """Address of the codes: another one means other weights."""
        return self.planes[0].data_ptr()

    def held_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def like(self, device: torch.device, dtype: torch.dtype) -> "PackedWeights":
        return self._with(lambda x: x.to(device), dtype)

    def _with(self, change: Any, dtype: torch.dtype | None = None) -> "PackedWeights":
        """With each part changed by a function that leaves K alone."""
        zero = None if self.zero is None else change(self.zero)
        planes = tuple(map(change, self.planes))
        dtype = dtype or self.dtype
        return PackedWeights(planes, change(self.scale), zero, self.scheme, self.shape[-1], dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """The chosen rows of a matrix, [.., K] for numbers [..], as a plain tensor."""
        flat = numbers.flatten()
        shared = flat if self.scheme.rows == 1 else flat // self.scheme.rows
        scheme = Scheme(
            self.scheme.bits, self.scheme.group, self.scheme.is_float, self.scheme.is_symmetric
        )
        planes = tuple(plane[flat] for plane in self.planes)
        zero = None if self.zero is None else self.zero[:, shared].contiguous()
        args = (
            planes,
            self.scale[:, shared].contiguous(),
            zero,
            scheme,
            self.shape[-1],
            self.dtype,
        )
        return PackedWeights(*args).dequantized().view(*numbers.shape, self.shape[-1])

    def part(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if func is aten.embedding.default and self.dim() == 2:
            return self.rows(args[1])
        if func is aten.t.default:
            return TransposedWeights(self)
        if self.dim() == 3:  # some of the experts
            if func is aten.select.int and args[1] == 0:
                return self._with(lambda x: x[args[2]])
            if func is aten.slice.Tensor and (len(args) < 2 or args[1] == 0):
                return self._with(lambda x: func(x, *args[1:], **kwargs))
            if func is aten.index.Tensor and len(args[1]) == 1:
                return self._with(lambda x: x[args[1][0]])
        return None

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedWeights(shape={tuple(self.shape)}, dtype={self.dtype}, {self.scheme})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = self._with(torch.clone)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        zero = self.zero
        parts = (self.planes, self.scale, zero, self.scheme, self.shape[-1], self.dtype)
        return PackedWeights, parts


def _per_word(dtype: torch.dtype) -> int:
    """P for numbers of a dtype."""
    return max(1, 4 // dtype.itemsize)


def _group_shape(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the scales, or zeros, of weights of a shape."""
    *outer, rows, num_inputs = shape
    each = _per_word(dtype)
    words = ceil_div(scheme.num_groups(num_inputs), each)
    return (*outer, words, ceil_div(rows, scheme.rows), each)


def _to_words(numbers: Tensor) -> Tensor:
    """[.., N / R, G] to [.., G / P, N / R, P]."""
    each = _per_word(numbers.dtype)
    padded = F.pad(numbers, (0, -numbers.shape[-1] % each))
    return padded.unflatten(-1, (-1, each)).transpose(-3, -2).contiguous()


def _from_words(words: Tensor, num_groups: int) -> Tensor:
    return words.transpose(-3, -2).flatten(-2)[..., :num_groups]


def _check_parts(
    planes: tuple[Tensor, ...],
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    shape: tuple[int, ...],
) -> None:
    *outer, rows, num_inputs = shape
    words = (*outer, rows, scheme.num_words(num_inputs))
    kinds = [kind for kind, _ in PLANES[scheme.bits]]
    wanted = [(f"plane {i}", words, kind) for i, kind in enumerate(kinds)]
    found = list(planes)
    wanted.append(("scale", _group_shape(scheme, shape, scale.dtype), scale.dtype))
    found.append(scale)
    if (zero is None) != (scheme.is_symmetric or scheme.is_float):
        raise ValueError(f"zero={zero is not None} is not allowed with {scheme}")
    if zero is not None:
        wanted.append(("zero", _group_shape(scheme, shape, torch.int16), torch.int16))
        found.append(zero)
    if len(found) != len(wanted):
        raise ValueError(f"{len(planes)} planes are not allowed: {scheme} has {len(kinds)}")
    for part, (name, size, kind) in zip(found, wanted, strict=True):
        if tuple(part.shape) != size or part.dtype != kind:
            raise ValueError(
                f"{name} of {list(part.shape)} in {part.dtype} is not allowed: for {list(shape)} "
                f"and {scheme} it must be {list(size)} in {kind}"
            )
