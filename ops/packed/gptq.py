"""Weights brought to few bits so that products with known inputs change least.

Source: GPTQ (arXiv 2210.17323). Inputs are quantised one after another, and those that follow make
up for each one's error as far as they correlate with it. The inputs that matter most come first;
groups stay where they are ("static groups"), and their scales are searched beforehand, with errors
weighted by what GPTQ would leave of them. On random weights and correlated inputs that gave less
error than scales by plain squared error (a fifth to a quarter less), and than the files' order with
scales searched when each group is reached (about a tenth).

For H = R R^T with R upper triangular, the error e of an input j, divided by R_jj^-1, changes those
after it by the row j of R^-1; its share of the whole error is (e R_jj)^2.

Shapes: E matrices, N outputs, K inputs, G groups of a row, R rows that share a scale.
"""

import torch
from torch import Tensor

from kimi_linear.ops.packed.rounding import (
    check_finite,
    find_scales,
    from_groups,
    nearest,
    to_codes,
    to_groups,
)
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme

# Inputs whose errors reach those after the block by one product.
BLOCK = 128
# Added to the diagonal, as a part of its mean; ten times as much where that is too little.
DAMPING = 0.01


def second_moment(inputs: Tensor) -> Tensor:
    """The sum over tokens of each input times each: [T, K] to [K, K] float32."""
    wide = inputs.float()
    return wide.t() @ wide


def drawn_to_shared(own: Tensor, num_tokens: Tensor | int, shared: Tensor) -> Tensor:
    """Hessians of experts, some of which have seen few tokens.

    Args:
        own: [.., K, K], sums over the expert's own tokens.
        num_tokens: [..], how many those are.
        shared: [K, K] or like `own`, the mean over all of the layer's tokens.

    Returns:
        [.., K, K], means over the expert's tokens and K more that are like all. (Of simulated
        experts whose inputs differ much or little from the others', K was near the best number
        whatever they had seen.)
    """
    count, more = torch.as_tensor(num_tokens, device=own.device)[..., None, None], own.shape[-1]
    return (own + more * shared) / (count + more)


@torch.no_grad()
def gptq(
    weights: Tensor, hessian: Tensor, scheme: Scheme, name: str = "weight", rows: int = 16384
) -> PackedWeights:
    """Bring weights to few bits, on their device.

    Args:
        weights: [N, K] or [E, N, K] of a floating dtype, which is also the scales'.
        hessian: [K, K] or [E, K, K], the mean or sum over tokens of each input times each.
        scheme: How they are to be held.
        name: The tensor's, for messages.
        rows: Outputs worked on at once, a multiple of the scheme's.

    Raises:
        ValueError: If groups do not divide K, sizes do not fit, or numbers are not finite.
    """
    num_inputs = weights.shape[-1]
    scheme.check_size(name, num_inputs)
    check_finite(weights, name)
    check_finite(hessian, f"the Hessian of {name}")
    if hessian.shape[-2:] != (num_inputs, num_inputs):
        raise ValueError(
            f"the Hessian of {name} is {list(hessian.shape)}; allowed: [.., {num_inputs}, "
            f"{num_inputs}]"
        )
    if weights.dim() == 2:
        return gptq(weights[None], hessian[None], scheme, name, rows)[0]  # type: ignore
    factor, order = _factor(hessian)
    made = PackedWeights.empty(tuple(weights.shape), scheme, weights.dtype, weights.device)
    for start in range(0, weights.shape[1], rows):
        piece = slice(start, start + rows)
        made.fill((slice(None), piece), _gptq(weights[:, piece], factor, order, scheme))
    return made


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """R [E, K, K], upper triangular, of Hessians whose inputs stand in the order [E, K]."""
    wide = hessian.double()
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    wide = wide.gather(-2, order[..., None].expand_as(wide))
    wide = wide.gather(-1, order[..., None, :].expand_as(wide))
    mean = diagonal.mean(-1)
    damping = torch.where(mean > 0, mean * DAMPING, torch.ones_like(mean))  # nothing known: 1
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    while True:
        damped = (wide + damping[..., None, None] * eye).flip(-2, -1)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return lower.flip(-2, -1), order
        damping = torch.where(failed > 0, damping * 10, damping)


def _gptq(weights: Tensor, factor: Tensor, order: Tensor, scheme: Scheme) -> PackedWeights:
    *_, rows, num_inputs = weights.shape
    own = factor.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(num_inputs, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True).float()
    places = order.argsort(dim=-1)  # of each input in the order
    importance = own.square().gather(-1, places).float()[..., None, :]
    importance = to_groups(importance.expand(-1, scheme.rows, -1), scheme)
    groups = to_groups(weights, scheme)
    scale, zero = find_scales(groups, scheme, weights.dtype, importance)
    # [E, K, N], inputs in their order: what one step reads lies together
    left = weights.float().transpose(1, 2)
    left = left.gather(1, order[..., None].expand_as(left))
    found = torch.empty_like(left)
    for start in range(0, num_inputs, BLOCK):
        block = slice(start, min(start + BLOCK, num_inputs))
        spread = _of_inputs(scale, order[:, block], scheme, rows)
        spread_zero = None if zero is None else _of_inputs(zero, order[:, block], scheme, rows)
        errors = _quantize_block(
            left[:, block],
            found[:, block],
            inverse[:, block, block],
            spread,
            spread_zero,
            scheme,
        )
        after = slice(block.stop, num_inputs)
        left[:, after].baddbmm_(inverse[:, block, after].transpose(1, 2), errors, alpha=-1)
    values = found.gather(1, places[..., None].expand_as(found)).transpose(1, 2)
    groups = to_groups(values, scheme)
    codes = from_groups(to_codes(groups, zero, scheme), scheme, rows, num_inputs)
    return PackedWeights.of_codes(codes, scale, zero, scheme, weights.dtype)


def _of_inputs(each: Tensor, inputs: Tensor, scheme: Scheme, rows: int) -> Tensor:
    """Scales or zeros [E, N / R, G] as each of some inputs [E, X] has them: [E, X, N]."""
    groups = inputs // (scheme.group or 1 << 62)
    turned = each.transpose(1, 2)
    if scheme.rows > 1:
        turned = turned.repeat_interleave(scheme.rows, dim=2)[..., :rows]
    return turned.gather(1, groups[..., None].expand(-1, -1, rows))


def _quantize_block(
    left: Tensor,
    found: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
) -> Tensor:
    """Write what `nearest` finds for inputs [E, X, N] into `found`; return their errors, divided.

    Args:
        left: The weights, of which each step changes those after it.
        inverse: [E, X, X], the inverse factor's rows and columns of these inputs.
        scale, zero: [E, X, N].
    """
    scale, errors = scale.float(), torch.empty_like(left)
    for i in range(left.shape[1]):
        zero_i = None if zero is None else zero[:, i]
        values = nearest(left[:, i, :, None], scale[:, i], zero_i, scheme)[..., 0]
        found[:, i] = values
        error = torch.addcmul(left[:, i], values, scale[:, i], value=-1)
        errors[:, i] = error.div_(inverse[:, i, i, None])
        after = inverse[:, i, i + 1 :, None]
        left[:, i + 1 :].addcmul_(after, errors[:, i, None], value=-1)
    return errors
