"""Weights brought to few bits, without data: each group's scale and zero by least squared error.

A group's range of codes is shrunk step by step: the largest weights lose, all others win. The best
step is kept, and its scale then fitted to the codes that it gives, by least squares.

Shapes: N outputs, K inputs, R rows that share a scale, G groups of a row, X numbers of a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme

# Parts of the full range that are tried. With few bits it pays to lose more.
SHRINKS = {3: (0.5, 0.02, 26), 4: (0.6, 0.02, 21), 8: (0.9, 0.01, 11)}
FITS = 2
# Numbers worked on at once: the search holds some ten wide copies of them.
PIECE = 1 << 24
FLOAT8_MAX = 448.0


@torch.no_grad()
def quantize(weights: Tensor, scheme: Scheme, name: str = "weight") -> PackedWeights:
    """Bring weights to few bits, on their device.

    Args:
        weights: [.., N, K] of a floating dtype, which is also the scales'.
        scheme: How they are to be held.
        name: The tensor's, for messages.

    Raises:
        ValueError: If groups do not divide K, or weights are not finite.
    """
    scheme.check_size(name, weights.shape[-1])
    if weights.dim() > 2:
        made = PackedWeights.empty(tuple(weights.shape), scheme, weights.dtype, weights.device)
        for i, matrix in enumerate(weights):
            made.fill(i, quantize(matrix, scheme, f"{name}[{i}]"))
        return made
    step = max(scheme.rows, PIECE // weights.shape[1] // scheme.rows * scheme.rows)
    parts = [_quantize_rows(rows, scheme, name) for rows in weights.split(step)]
    codes, scale, zero = (
        None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)
    )
    return PackedWeights.of_codes(codes, scale, zero, scheme, weights.dtype)


def _quantize_rows(
    weights: Tensor, scheme: Scheme, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K], scale and zero [N / R, G] of a matrix."""
    groups = to_groups(weights, scheme)  # [N / R, G, X]
    if not bool(torch.isfinite(groups).all()):
        raise ValueError(f"{name} has numbers that are not finite, and cannot be quantised")
    if scheme.is_float:
        codes, scale, zero = _float8(groups, weights.dtype)
    elif scheme.is_symmetric:
        codes, scale, zero = _symmetric(groups, scheme, weights.dtype)
    else:
        codes, scale, zero = _asymmetric(groups, scheme, weights.dtype)
    return from_groups(codes, scheme, *weights.shape), scale, zero


def to_groups(weights: Tensor, scheme: Scheme) -> Tensor:
    """[N, K] to float32 [N / R, G, X], with zeros where the last group or rows are cut short."""
    rows, num_inputs = weights.shape
    group = scheme.group or num_inputs
    padded = F.pad(weights.float(), (0, -num_inputs % group, 0, -rows % scheme.rows))
    blocks = padded.unflatten(0, (-1, scheme.rows)).unflatten(2, (-1, group))
    return blocks.transpose(1, 2).flatten(2)


def from_groups(codes: Tensor, scheme: Scheme, rows: int, num_inputs: int) -> Tensor:
    """[N / R, G, X] back to [N, K]."""
    group = scheme.group or num_inputs
    blocks = codes.unflatten(2, (scheme.rows, group)).transpose(1, 2)
    return blocks.flatten(2).flatten(0, 1)[:rows, :num_inputs]


def _float8(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, None]:
    scale = _stored(groups.abs().amax(-1) / FLOAT8_MAX, dtype)
    values = (groups / scale.float()[..., None]).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return values.to(torch.float8_e4m3fn).view(torch.uint8), scale, None


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it is stored; never 0, by which codes would be divided."""
    return scale.to(dtype).clamp(min=torch.finfo(dtype).tiny)


def _symmetric(groups: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, None]:
    middle = scheme.middle
    # codes reach one further below the middle: the side of the largest number gets it
    flat = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    full = -flat / middle
    best, best_error = None, None
    start, step, count = SHRINKS[scheme.bits]
    for i in range(count):
        scale = _signed(full * (start + step * i), dtype)
        best, best_error = _better(groups, scale, middle, best, best_error)
    assert best is not None
    for _ in range(FITS):
        values = _rounded(groups, best, middle)
        fitted = (groups * values).sum(-1) / values.square().sum(-1).clamp(min=1)
        best, best_error = _better(groups, _signed(fitted, dtype), middle, best, best_error)
    return (_rounded(groups, best, middle) + middle).to(torch.uint8), best, None


def _signed(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `_stored`, with its sign."""
    tiny = torch.finfo(dtype).tiny
    stored = scale.to(dtype)
    return torch.where(stored.abs() < tiny, torch.full_like(stored, tiny), stored)


def _rounded(groups: Tensor, scale: Tensor, middle: int) -> Tensor:
    return (groups / scale.float()[..., None]).round_().clamp_(-middle, middle - 1)


def _better(
    groups: Tensor, scale: Tensor, middle: int, best: Tensor | None, best_error: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The better of two scales for each group, and its error."""
    values = _rounded(groups, scale, middle)
    error = values.mul_(scale.float()[..., None]).sub_(groups).square_().sum(-1)
    if best is None or best_error is None:
        return scale, error
    is_better = error < best_error
    return torch.where(is_better, scale, best), torch.where(is_better, error, best_error)


def _asymmetric(
    groups: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    most = (1 << scheme.bits) - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = None
    start, step, count = SHRINKS[scheme.bits]
    for i in range(count):
        shrink = start + step * i
        scale = _stored((high - low) * shrink / most, dtype)
        zero = (-low * shrink / scale.float()).round().clamp(0, most)
        values = _shifted(groups, scale, zero, most)
        spread = scale.float()[..., None]
        error = ((values - zero[..., None]) * spread - groups).square().sum(-1)
        if best is None:
            best = scale, zero, error
            continue
        is_better = error < best[2]
        found = (scale, zero, error)
        best = tuple(torch.where(is_better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    scale, zero, _ = best
    return _shifted(groups, scale, zero, most).to(torch.uint8), scale, zero.to(torch.uint8)


def _shifted(groups: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    return ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp_(0, most)
