"""Triton kernels of the decode step's experts: their choice, and their two products.

A few rows read the experts that each of them chose. For more rows the choices are sorted, and each
expert is read once for all that chose it. See `projection_kernels.py`, also for IS_LINKED.

Shapes: B rows (one token each), D hidden size, E experts, I expert width, S slots of a row: its
chosen experts and then its shared ones.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.projection_kernels import norm_scale, wait, wait_first
from kimi_linear.ops.runtime import jit, tl


# --------------------------------------------------------------------------------------- few rows
@jit
def route_kernel(
    logits,  # float32 [B, E]
    bias,  # [E]
    experts,  # int32 [B, TOP], to be written
    weights,  # float32 [B, TOP], to be written
    scaling,
    E: tl.constexpr,
    PLACES: tl.constexpr,  # E, or more, a power of two
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,  # TOP, or more, a power of two
    IS_SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """The experts of each row, by falling score, and their weights."""
    row = tl.program_id(0)
    e, slot = tl.arange(0, PLACES), tl.arange(0, SLOTS)
    correction = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    wait(IS_LINKED)
    logit = tl.load(logits + row * E + e, mask=e < E, other=-float("inf"))
    largest, total = 0.0, 1.0
    if not IS_SIGMOID:
        largest = tl.max(logit)
        total = tl.sum(tl.exp(logit - largest))
    score = tl.sigmoid(logit) if IS_SIGMOID else tl.exp(logit - largest) / total
    # as integers of the same order, of which a warp finds the largest in one instruction
    choice = (score + correction).to(tl.int32, bitcast=True)
    choice = tl.where(choice < 0, choice ^ 0x7FFFFFFF, choice)
    choice = tl.where(e < E, choice, -0x80000000)
    chosen = tl.zeros([SLOTS], tl.int32)
    for i in tl.static_range(TOP):
        best = tl.min(tl.where(choice == tl.max(choice), e, PLACES))
        chosen = tl.where(slot == i, best, chosen)
        choice = tl.where(e == best, -0x80000000, choice)
    logit = tl.load(logits + row * E + chosen)
    score = tl.sigmoid(logit) if IS_SIGMOID else tl.exp(logit - largest) / total
    if RENORMALIZE:
        score /= tl.sum(tl.where(slot < TOP, score, 0.0)) + 1e-20
    tl.store(experts + row * TOP + slot, chosen, mask=slot < TOP)
    tl.store(weights + row * TOP + slot, score * scaling, mask=slot < TOP)


@jit
def gated(gate, up):
    return gate * tl.sigmoid(gate) * up


@jit
def experts_in_kernel(
    x,  # [B, D]
    norm,  # [D]
    experts,  # int32 [B, TOP]
    gate_up,  # [E, 2 * I, D]
    shared_gate,  # [shared * I, D]
    shared_up,
    out,  # [B, S, I]
    eps,
    D: tl.constexpr,
    LARGE: tl.constexpr,
    SMALL: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """silu(gate) * up of every slot of every row, for norm(x).

    Programs of shared experts, whose weights need no choice, come first.
    """
    row = (tl.program_id(1) // SLOTS).to(tl.int64)
    slot = (tl.program_id(1) + TOP) % SLOTS
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if slot < TOP:
        wait_first(IS_LINKED)
        gate = gate_up + tl.load(experts + row * TOP + slot).to(tl.int64) * 2 * I * D
        up = gate + I * D
    else:
        gate = shared_gate + (slot - TOP) * I * D
        up = shared_up + (slot - TOP) * I * D
    d = tl.arange(0, LARGE)
    inside = (n < I)[:, None]
    gate_w = tl.load(gate + n[:, None] * D + d[None, :], mask=inside, other=0.0)
    up_w = tl.load(up + n[:, None] * D + d[None, :], mask=inside, other=0.0)
    if SMALL > 0:
        e = LARGE + tl.arange(0, SMALL)
        both = inside & (e < D)[None, :]
        gate_e = tl.load(gate + n[:, None] * D + e[None, :], mask=both, other=0.0)
        up_e = tl.load(up + n[:, None] * D + e[None, :], mask=both, other=0.0)
    if slot >= TOP:
        wait_first(IS_LINKED)
    x_d = tl.load(x + row * D + d).to(tl.float32)
    square = tl.sum(x_d * x_d)
    if SMALL > 0:
        x_e = tl.load(x + row * D + e, mask=e < D, other=0.0).to(tl.float32)
        square += tl.sum(x_e * x_e)
        x_e *= tl.load(norm + e, mask=e < D, other=0.0).to(tl.float32)
    x_d *= tl.load(norm + d).to(tl.float32)
    gate_y = tl.sum(gate_w.to(tl.float32) * x_d[None, :], axis=1)
    up_y = tl.sum(up_w.to(tl.float32) * x_d[None, :], axis=1)
    if SMALL > 0:
        gate_y += tl.sum(gate_e.to(tl.float32) * x_e[None, :], axis=1)
        up_y += tl.sum(up_e.to(tl.float32) * x_e[None, :], axis=1)
    scale = norm_scale(square, D, eps)
    tl.store(out + (row * SLOTS + slot) * I + n, gated(gate_y * scale, up_y * scale), mask=n < I)


@jit
def experts_out_kernel(
    x,  # [B, S, I]
    experts,  # int32 [B, TOP]
    weights,  # float32 [B, TOP]
    down,  # [E, D, I]
    shared_down,  # [D, shared * I]
    residual,  # [B, D], or anything without HAS_RESIDUAL
    out,  # [B, D], to be written; may be the residual
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    PLACES: tl.constexpr,  # I, or more, a power of two
    SHARED_PLACES: tl.constexpr,  # shared * I, or more, a power of two
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = residual + weighted outputs of a row's experts + outputs of its shared experts.

    What was chosen is known: `experts_in_kernel`, before this one, starts it after its own wait.
    """
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, s = tl.arange(0, PLACES), tl.arange(0, SHARED_PLACES)
    inside = (n < D)[:, None] & (i < I)[None, :]
    width: tl.constexpr = (SLOTS - TOP) * I
    chosen = ()
    for slot in tl.static_range(TOP):
        # a multiprocessor's cache may still hold an older choice
        expert = tl.load(experts + row * TOP + slot, cache_modifier=".cg").to(tl.int64)
        place = down + (expert * D + n[:, None]) * I + i[None, :]
        chosen = chosen + (tl.load(place, mask=inside, other=0.0),)
    if SLOTS > TOP:
        both = (n < D)[:, None] & (s < width)[None, :]
        shared_w = tl.load(shared_down + n[:, None] * width + s[None, :], mask=both, other=0.0)
    wait(IS_LINKED)
    x += row * SLOTS * I
    y = tl.zeros([BLOCK], tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + row * D + n, mask=n < D, other=0.0).to(tl.float32)
    products = tl.zeros([BLOCK, PLACES], tl.float32)
    for slot in tl.static_range(TOP):
        a = tl.load(x + slot * I + i, mask=i < I, other=0.0).to(tl.float32)
        products += chosen[slot].to(tl.float32) * (tl.load(weights + row * TOP + slot) * a)[None, :]
    y += tl.sum(products, axis=1)
    if SLOTS > TOP:
        a = tl.load(x + TOP * I + s, mask=s < width, other=0.0).to(tl.float32)
        y += tl.sum(shared_w.to(tl.float32) * a[None, :], axis=1)
    tl.store(out + row * D + n, y, mask=n < D)


# -------------------------------------------------------------------------------------- many rows
@jit
def group_kernel(
    experts,  # int32 [pairs]
    order,  # int32 [pairs], to be written: the pairs (row, choice) by expert
    first,  # int32 [BINS], to be written: each expert's first place there, and beyond the last one
    active,  # int32 [E + 1], to be written: how many experts were chosen, and which
    num_pairs,
    E: tl.constexpr,
    BINS: tl.constexpr,  # E + 1, or more, a power of two
    PAIRS: tl.constexpr,  # num_pairs, or more, a power of two
    IS_LINKED: tl.constexpr,
):
    """Sort what the rows chose by expert."""
    wait(IS_LINKED)
    pair = tl.arange(0, PAIRS)
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=E)
    tl.store(order + pair, tl.sort(expert * PAIRS + pair) % PAIRS, mask=pair < num_pairs)
    count, e = tl.histogram(expert, BINS), tl.arange(0, BINS)
    tl.store(first + e, tl.cumsum(count, axis=0) - count)
    chosen = (count > 0) & (e < E)
    place = tl.cumsum(chosen.to(tl.int32), axis=0)
    tl.store(active + place, e, mask=chosen)
    tl.store(active, tl.sum(chosen.to(tl.int32)))


@jit
def program_expert(begin, active):
    """The expert of this program, and where its pairs start and stop: nowhere if none is left."""
    is_used = tl.program_id(1) < tl.load(active)
    expert = tl.load(active + 1 + tl.program_id(1), mask=is_used, other=0)
    start = tl.load(begin + expert)
    return expert, start, tl.where(is_used, tl.load(begin + expert + 1), start)


@jit
def grouped_in_kernel(
    x,  # [B, D], normed
    order,  # int32 [B * TOP] and
    begin,  # int32 [E + 1] and
    active,  # int32 [E + 1], see `group_kernel`
    gate_up,  # [E, 2 * I, D]
    out,  # [B * TOP, I]
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """silu(gate) * up of the rows that chose an expert, a tile of an expert by program."""
    wait(IS_LINKED)
    expert, start_pair, stop_pair = program_expert(begin, active)
    n, d, g = (
        tl.program_id(0) * BLOCK + tl.arange(0, BLOCK),
        tl.arange(0, STEP),
        tl.arange(0, GROUP),
    )
    gate = gate_up + expert.to(tl.int64) * 2 * I * D + n[None, :] * D
    for first in range(start_pair, stop_pair, GROUP):
        there = first + g < stop_pair
        pair = tl.load(order + first + g, mask=there, other=0)
        row = x + (pair // TOP)[:, None] * D
        gate_y = tl.zeros([GROUP, BLOCK], tl.float32)
        up_y = tl.zeros([GROUP, BLOCK], tl.float32)
        for start in range(0, D, STEP):
            k = start + d
            a = tl.load(row + k[None, :], mask=(k < D)[None, :], other=0.0)
            inside = (k < D)[:, None] & (n < I)[None, :]
            w = tl.load(gate + k[:, None], mask=inside, other=0.0)
            u = tl.load(gate + I * D + k[:, None], mask=inside, other=0.0)
            gate_y = tl.dot(a, w, gate_y)
            up_y = tl.dot(a, u, up_y)
        mask = there[:, None] & (n < I)[None, :]
        tl.store(out + pair[:, None] * I + n[None, :], gated(gate_y, up_y), mask=mask)


@jit
def grouped_out_kernel(
    x,  # [B * TOP, I]
    order,  # int32 [B * TOP] and
    begin,  # int32 [E + 1] and
    active,  # int32 [E + 1], see `group_kernel`
    weights,  # float32 [B * TOP]
    down,  # [E, D, I]
    out,  # [B, PARTS, D], the first TOP parts of each row
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Weighted outputs of the pairs of an expert, a tile of an expert by program."""
    wait(IS_LINKED)
    expert, start_pair, stop_pair = program_expert(begin, active)
    n, i, g = (
        tl.program_id(0) * BLOCK + tl.arange(0, BLOCK),
        tl.arange(0, STEP),
        tl.arange(0, GROUP),
    )
    weight = down + expert.to(tl.int64) * D * I + n[None, :] * I
    for first in range(start_pair, stop_pair, GROUP):
        there = first + g < stop_pair
        pair = tl.load(order + first + g, mask=there, other=0)
        y = tl.zeros([GROUP, BLOCK], tl.float32)
        for start in range(0, I, STEP):
            k = start + i
            a = tl.load(x + pair[:, None] * I + k[None, :], mask=(k < I)[None, :], other=0.0)
            inside = (k < I)[:, None] & (n < D)[None, :]
            y = tl.dot(a, tl.load(weight + k[:, None], mask=inside, other=0.0), y)
        y *= tl.load(weights + pair)[:, None]
        mask = there[:, None] & (n < D)[None, :]
        part = pair // TOP * PARTS + pair % TOP
        tl.store(out + part[:, None] * D + n[None, :], y, mask=mask)
