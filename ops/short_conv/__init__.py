"""A KDA layer's projections, and the short convolutions that q, k and v pass.

Technical report (arXiv 2510.26692), section 3: q, k and v pass a causal depthwise convolution of a
few taps and SiLU. `convolved_projections` is the entry; it chooses among three forms:

- training on a GPU: all projections as one product, and one kernel behind it (`training.py`);
- no graph on a GPU: one kernel for the three convolutions (`prefill_kernels.py`);
- else the modules one by one (`convolution.py`), in FLA or in torch, which is the reference.

Shapes: B batch, T tokens, D hidden size, H heads, K head size, W taps, N sequences.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kimi_linear.ops.joint_products import joint_weights
from kimi_linear.ops.projections import LinearInput
from kimi_linear.ops.runtime import has_kernels
from kimi_linear.ops.short_conv.convolution import convolution_state
from kimi_linear.ops.short_conv.prefill_kernels import convolve_three
from kimi_linear.ops.short_conv.training import project_jointly


class ConvolvedProjections(NamedTuple):
    """What a KDA layer reads from its input.

    Attributes:
        q, k, v: [B, T, H, K], after convolution and SiLU.
        others: products of the other projections, [B, T, .].
        conv_state: [N, 3, H * K, W - 1], the last inputs of the three convolutions, oldest first;
            None unless it was asked for.
        conv_at_cut: the same after `cut` tokens; None without a cut.
        is_normalised: whether each head of q and k has an L2 norm of 1 already.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    others: tuple[Tensor, ...]
    conv_state: Tensor | None
    is_normalised: bool
    conv_at_cut: Tensor | None = None


def convolved_projections(
    x: Tensor,
    projections: Sequence[nn.Module],
    convolutions: Sequence[Any],
    others: Sequence[nn.Module],
    head_dim: int,
    *,
    conv_state: Tensor | None = None,
    output_state: bool = False,
    cut: int = 0,
    cu_seqlens: Tensor | None = None,
    token_starts: Callable[[], Tensor | None] = lambda: None,
    last_inputs: Callable[[Tensor, Tensor | None, int], Tensor] | None = None,
) -> ConvolvedProjections:
    """Project x; convolve the products that are q, k and v.

    Args:
        x: [B, T, D], or [1, T, D] with `cu_seqlens`.
        projections: linear layers of q, k and v.
        convolutions: modules that hold the taps of q, k and v as `weight` [H * K, 1, W], oldest
            first, and take what `short_convolution` takes behind the weight.
        others: linear layers whose products are returned as they are.
        head_dim: K.
        conv_state: inputs of the three convolutions before x, [N, 3, H * K, W - 1]; None for zeros.
        output_state: return that state after the last token too.
        cut: number of tokens after which it is returned too, of rows without `cu_seqlens`.
        cu_seqlens: [N + 1] int32, ends of packed sequences.
        token_starts: returns [T] int32, the first token of each token's sequence, or None for
            plain rows; asked in training with `cu_seqlens` only.
        last_inputs: makes a convolution's new state of its inputs [B, T, H * K], its old state
            and W - 1, where padding lies behind the rows' last tokens.
    """
    heads = (-1, head_dim)
    if conv_state is None and not output_state:
        taps = [convolution.weight for convolution in convolutions]
        weights = joint_weights(x, (*projections, *others), *taps)
        if weights is not None:
            q, k, v, *rest = project_jointly(x, weights, taps, token_starts(), head_dim)
            q, k, v = (each.unflatten(-1, heads) for each in (q, k, v))
            return ConvolvedProjections(q, k, v, tuple(rest), None, is_normalised=True)
    read = LinearInput(x)
    inputs = [read.through(projection) for projection in projections]
    taps = [convolution.weight for convolution in convolutions]
    state: Tensor | None
    is_joint = has_kernels(*inputs, *taps)
    if is_joint:
        outputs, state = convolve_three(inputs, taps, conv_state, head_dim, cu_seqlens)
        if last_inputs is not None and output_state:
            state = _states(last_inputs, inputs, taps, conv_state)
    else:
        outputs, state = _one_by_one(
            inputs, convolutions, conv_state, output_state, cu_seqlens, last_inputs
        )
    q, k, v = (out.unflatten(-1, heads) for out in outputs)
    rest = [other(x) for other in others]
    state = state if output_state else None
    at_cut = _state_at(cut, inputs, taps, conv_state) if cut else None
    return ConvolvedProjections(q, k, v, tuple(rest), state, is_joint, at_cut)


def _state_at(
    cut: int, inputs: Sequence[Tensor], taps: Sequence[Tensor], states: Tensor | None
) -> Tensor:
    """[B, 3, H * K, W - 1]: the last inputs of the three convolutions after `cut` tokens."""
    return _states(convolution_state, [x[:, :cut] for x in inputs], taps, states)


def _states(
    last: Callable[[Tensor, Tensor | None, int], Tensor],
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    states: Tensor | None,
) -> Tensor:
    """[B, 3, H * K, W - 1]: what `last` makes of each convolution's inputs and its old state."""
    before: Sequence[Tensor | None] = 3 * [None] if states is None else states.unbind(1)
    tails = [
        last(x, old, tap.shape[2] - 1) for x, old, tap in zip(inputs, before, taps, strict=True)
    ]
    return torch.stack(tails, dim=1)


def _one_by_one(
    inputs: Sequence[Tensor],
    convolutions: Sequence[Any],
    states: Tensor | None,
    output_state: bool,
    cu_seqlens: Tensor | None,
    last_inputs: Callable[[Tensor, Tensor | None, int], Tensor] | None,
) -> tuple[list[Tensor], Tensor | None]:
    outputs, tails = [], []
    for i, convolution in enumerate(convolutions):
        before = None if states is None else states[:, i]
        out, tail = convolution(
            inputs[i],
            initial_state=before,
            output_final_state=output_state and last_inputs is None,
            cu_seqlens=cu_seqlens,
        )
        if output_state and last_inputs is not None:
            tail = last_inputs(inputs[i], before, convolution.weight.shape[2] - 1)
        outputs.append(out)
        tails.append(tail)
    return outputs, torch.stack(tails, dim=1) if output_state else None
