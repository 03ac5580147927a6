"""Weights brought to few bits, without data: each group's scale and zero by least squared error.

A group's range of codes is shrunk step by step: the largest weights lose, all others win. The best
step is kept, and its scale then fitted to the codes that it gives, by least squares. `gptq.py`,
which knows the inputs, has errors weighted by how much each input matters.

Shapes: E experts, N outputs, K inputs, R rows that share a scale, G groups of a row, X numbers of a
group.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme

# Parts of the full range that are tried. With few bits it pays to lose more.
SHRINKS = {3: (0.5, 0.02, 26), 4: (0.6, 0.02, 21), 8: (0.9, 0.01, 11)}
FITS = 2
# Numbers worked on at once, of which there are four wide copies: a GPU is to be busy for longer
# than a launch takes, a CPU to find them in its cache.
PIECE, CPU_PIECE = 1 << 24, 1 << 20
FLOAT8_MAX = 448.0


@torch.no_grad()
def quantize(weights: Tensor, scheme: Scheme, name: str = "weight") -> PackedWeights:
    """Bring weights to few bits, on their device.

    Args:
        weights: [N, K] or [E, N, K] of a floating dtype, which is also the scales'.
        scheme: How they are to be held.
        name: The tensor's, for messages.

    Raises:
        ValueError: If groups do not divide K, or weights are not finite.
    """
    scheme.check_size(name, weights.shape[-1])
    check_finite(weights, name)
    if weights.dim() == 2:
        return _quantize(weights[None], scheme)[0]  # type: ignore[return-value]
    return _quantize(weights, scheme)


def _quantize(weights: Tensor, scheme: Scheme) -> PackedWeights:
    made = PackedWeights.empty(tuple(weights.shape), scheme, weights.dtype, weights.device)
    for experts, rows in _pieces(weights, scheme.rows):
        part = weights[experts, rows]
        groups = to_groups(part, scheme)
        scale, zero = find_scales(groups, scheme, weights.dtype)
        codes = to_codes(nearest(groups, scale, zero, scheme), zero, scheme)
        codes = from_groups(codes, scheme, *part.shape[-2:])
        made.fill((experts, rows), PackedWeights.of_codes(codes, scale, zero, scheme, part.dtype))
    return made


def _pieces(weights: Tensor, multiple: int) -> Iterator[tuple[slice, slice]]:
    """Slices of [E, N, K] to work on: whole matrices, or of a large one some rows at a time."""
    num_experts, rows, num_inputs = weights.shape
    size = max(1, (CPU_PIECE if weights.device.type == "cpu" else PIECE) // num_inputs)
    step = max(1, size // multiple) * multiple if size < rows else rows
    together = max(1, size // rows)
    for expert in range(0, num_experts, together):
        for row in range(0, rows, step):
            yield slice(expert, expert + together), slice(row, row + step)


def check_finite(weights: Tensor, name: str) -> None:
    """Raise ValueError if weights [N, K] or [E, N, K] hold NaN or Inf; the message names them."""
    if all(bool(each.isfinite()) for each in torch.aminmax(weights)):  # without a mask of them all
        return
    if weights.dim() > 2:
        for i, matrix in enumerate(weights):
            check_finite(matrix, f"{name}[{i}]")
    raise ValueError(f"{name} has numbers that are not finite, and cannot be quantised")


def to_groups(weights: Tensor, scheme: Scheme) -> Tensor:
    """[.., N, K] to float32 [.., N / R, G, X], with zeros where the last group or rows are cut
    short."""
    rows, num_inputs = weights.shape[-2:]
    group = scheme.group or num_inputs
    padded = F.pad(weights.float(), (0, -num_inputs % group, 0, -rows % scheme.rows))
    blocks = padded.unflatten(-1, (-1, group)).unflatten(-3, (-1, scheme.rows))
    return blocks.transpose(-3, -2).flatten(-2)


def from_groups(codes: Tensor, scheme: Scheme, rows: int, num_inputs: int) -> Tensor:
    """[.., N / R, G, X] back to [.., N, K]."""
    group = scheme.group or num_inputs
    blocks = codes.unflatten(-1, (scheme.rows, group)).transpose(-3, -2)
    return blocks.flatten(-2).flatten(-3, -2)[..., :rows, :num_inputs]


def find_scales(
    groups: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scale of each group, and its zero where the scheme has such.

    Args:
        groups: [.., G, X] float32.
        scheme: How they are to be held.
        dtype: The scales'.
        importance: What squared errors are multiplied by, [.., G, X] or what expands to it.

    Returns:
        [.., G] of `dtype`, and uint8 or None.
    """
    if scheme.is_float:
        return _stored(groups.abs().amax(-1) / FLOAT8_MAX, dtype), None
    root = None if importance is None else importance.sqrt()
    room = torch.empty_like(groups)
    scale, zero, least = None, None, None
    for tried, middle in _ranges(groups, scheme, dtype):
        error = _error(groups, tried, middle, scheme, root, room)
        if scale is None or least is None:
            scale, zero, least = tried, middle, error
            continue
        is_better = error < least
        scale, least = torch.where(is_better, tried, scale), torch.where(is_better, error, least)
        if middle is not None and zero is not None:
            zero = torch.where(is_better, middle, zero)
    assert scale is not None and least is not None
    for _ in range(FITS):
        tried = _fitted(groups, scale, zero, scheme, importance, room, dtype)
        error = _error(groups, tried, zero, scheme, root, room)
        is_better = error < least
        scale, least = torch.where(is_better, tried, scale), torch.where(is_better, error, least)
    return scale, zero


def _ranges(
    groups: Tensor, scheme: Scheme, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and zeros [.., G] to try, of the full range and parts of it."""
    start, step, count = SHRINKS[scheme.bits]
    shrinks = [start + step * i for i in range(count)]
    if scheme.is_symmetric:
        # codes reach one further below the middle: the side of the largest number gets it
        flat = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        for shrink in shrinks:
            yield _stored(flat * (-shrink / scheme.middle), dtype), None
        return
    most = (1 << scheme.bits) - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    for shrink in shrinks:
        scale = _stored((high - low) * (shrink / most), dtype)
        yield scale, (-low * shrink / scale.float()).round().clamp(0, most).to(torch.uint8)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it is stored; never 0, by which codes would be divided."""
    tiny = torch.finfo(dtype).tiny
    stored = scale.to(dtype)
    return torch.where(stored.abs() < tiny, torch.full_like(stored, tiny), stored)


def _error(
    groups: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    root: Tensor | None,
    room: Tensor,
) -> Tensor:
    """[.., G]: the length of each group's error, of which each number is multiplied by `root`."""
    values = nearest(groups, scale, zero, scheme, room)
    torch.addcmul(groups, values, scale.float()[..., None], value=-1, out=room)
    if root is not None:
        room.mul_(root)
    return torch.linalg.vector_norm(room, dim=-1)


def _fitted(
    groups: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    importance: Tensor | None,
    room: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[.., G]: the scales that fit the codes of other scales best."""
    values = nearest(groups, scale, zero, scheme, room)
    weighted = values if importance is None else values * importance
    length = (weighted * values).sum(-1)
    product = torch.mul(weighted, groups, out=weighted).sum(-1)
    return _stored(torch.where(length > 0, product / length, scale.float()), dtype)


def nearest(
    numbers: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    out: Tensor | None = None,
) -> Tensor:
    """What is to be multiplied by the scale to come nearest to numbers.

    Args:
        numbers: [.., G, X] float32, of groups or of some of their numbers.
        scale, zero: [.., G].
        scheme: How they are held.
        out: Where to put the result.

    Returns:
        [.., G, X] float32: codes minus zero, or float8 numbers.
    """
    values = torch.div(numbers, scale.float()[..., None], out=out)
    if scheme.is_float:
        return values.copy_(values.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn))
    most = (1 << scheme.bits) - 1
    if zero is None:
        return values.round_().clamp_(-scheme.middle, most - scheme.middle)
    low = -zero.float()[..., None]
    return values.round_().clamp_(low, low + most)


def to_codes(values: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The uint8 codes of what `nearest` returns."""
    if scheme.is_float:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    if zero is None:
        return (values + scheme.middle).to(torch.uint8)
    return (values + zero.float()[..., None]).to(torch.uint8)
