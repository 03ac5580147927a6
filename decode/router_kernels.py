"""Triton kernels of the decode step's router: scores of experts, and their choice.

ROUTER says how experts are chosen (`router.Router.form`): E, TOP, both in powers of two of places,
whether scores are sigmoids, and whether weights are normalised. See `projection_kernels.py`, also
for IS_LINKED.

Shapes: B rows (one token each), D hidden size, E experts, P inputs in whole blocks of 256.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.fixed_point_kernels import norm_fixed
from kimi_linear.decode.projection_kernels import is_last_program, norm_scale, sum_parts, wait
from kimi_linear.ops.runtime import jit, tl


@jit
def _load_scores(logits, row, ROUTER: tl.constexpr):
    """float32 [places] of a row; behind the last expert anything."""
    e = tl.arange(0, ROUTER[2])
    there = e < ROUTER[0]
    # a multiprocessor's cache may still hold older ones
    place = logits + row * ROUTER[0] + e
    logit = tl.load(place, mask=there, other=-float("inf"), cache_modifier=".cg")
    if ROUTER[4]:
        return tl.sigmoid(logit)
    else:
        odds = tl.exp(logit - tl.max(logit))
        return odds / tl.sum(odds)


@jit
def _order(score, correction, ROUTER: tl.constexpr):
    """int32 [places]: as corrected scores are ordered, so that NaN has a place too."""
    order = (score + correction).to(tl.int32, bitcast=True)
    order = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    return tl.where(tl.arange(0, ROUTER[2]) < ROUTER[0], order, -0x80000000)


@jit
def _store_choice(chosen, score, experts, weights, row, scaling, ROUTER: tl.constexpr):
    """Write a row's experts [slots] and their weights."""
    slot = tl.arange(0, ROUTER[3])
    TOP: tl.constexpr = ROUTER[1]
    if ROUTER[5]:
        score /= tl.sum(tl.where(slot < TOP, score, 0.0)) + 1e-20
    tl.store(experts + row * TOP + slot, chosen, mask=slot < TOP)
    tl.store(weights + row * TOP + slot, score * scaling, mask=slot < TOP)


@jit
def choose(logits, correction, experts, weights, row, scaling, ROUTER: tl.constexpr):
    """The experts of a row, by falling score, and their weights: at once, by counting how many are
    before each, since programs of several warps take long for one after the other."""
    e, slot = tl.arange(0, ROUTER[2]), tl.arange(0, ROUTER[3])
    score = _load_scores(logits, row, ROUTER)
    # no two alike: of equal ones the first comes first
    order = _order(score, correction, ROUTER).to(tl.int64) * ROUTER[2] - e
    rank = tl.sum((order[:, None] > order[None, :]).to(tl.int32), axis=0)
    is_there = rank[:, None] == slot[None, :]
    chosen = tl.sum(tl.where(is_there, e[:, None], 0), axis=0)
    score = tl.sum(tl.where(is_there, score[:, None], 0.0), axis=0)
    _store_choice(chosen, score, experts, weights, row, scaling, ROUTER)


@jit
def route_kernel(
    logits,  # float32 [B, E]
    bias,  # [E]
    experts,  # int32 [B, TOP], to be written
    weights,  # float32 [B, TOP], to be written
    scaling,
    ROUTER: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """The experts of each row, by falling score, and their weights: one after the other."""
    row = tl.program_id(0)
    TOP: tl.constexpr = ROUTER[1]
    PLACES: tl.constexpr = ROUTER[2]
    SLOTS: tl.constexpr = ROUTER[3]
    e, slot = tl.arange(0, PLACES), tl.arange(0, SLOTS)
    correction = tl.load(bias + e, mask=e < ROUTER[0], other=0.0).to(tl.float32)
    wait(IS_LINKED)
    score = _load_scores(logits, row, ROUTER)
    # as integers, of which a warp finds the largest in one instruction
    order = _order(score, correction, ROUTER)
    chosen = tl.zeros([SLOTS], tl.int32)
    for i in tl.static_range(TOP):
        best = tl.min(tl.where(order == tl.max(order), e, PLACES))
        chosen = tl.where(slot == i, best, chosen)
        order = tl.where(e == best, -0x80000000, order)
    is_there = e[:, None] == chosen[None, :]
    score = tl.sum(tl.where(is_there, score[:, None], 0.0), axis=0)
    _store_choice(chosen, score, experts, weights, row, scaling, ROUTER)


@jit
def score_kernel(
    hidden,  # [B, D]
    parts,  # [B, PARTS, D], added to it
    norm,  # [D], or anything without HAS_NORM
    gate,  # [E, D]
    bias,  # [E]
    logits,  # float32 [B, E], to be written
    arrived,  # int32 [1], 0
    experts,  # int32 [B, TOP] and
    weights,  # float32 [B, TOP], to be written with CHOOSES
    total,  # [B, D] and
    normed,  # [B, D] and
    columns,  # int8 [B, 8, P] and
    wide_columns,  # float16 [B, 4, P] and
    halves,  # int8 [B, 2, P] and
    unit,  # float32 [B, P / 32]: sum and its norm, to be written unless P is 0
    scaling,
    eps,
    D: tl.constexpr,
    P: tl.constexpr,
    PLACES: tl.constexpr,  # D, or more, a power of two
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # B
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CHOOSES: tl.constexpr,  # whether the last program does what `route_kernel` does
    ROUTER: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Scores of norm(hidden + sum of parts), a tile of experts by program.

    Unless P is 0, the first programs write a row's sum and norm each, which no other waits for.
    """
    WRITERS: tl.constexpr = ROWS if P > 0 else 0
    E: tl.constexpr = ROUTER[0]
    d = tl.arange(0, PLACES)
    inside = d < D
    if HAS_NORM:
        norm_d = tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    if P > 0:
        if tl.program_id(0) < ROWS:
            wait(IS_LINKED)
            row = tl.program_id(0).to(tl.int64)
            x = sum_parts(hidden, parts, row, d, inside, D, PARTS)
            tl.store(total + row * D + d, x, mask=inside)
            out = (columns, wide_columns, halves, unit)
            norm_fixed(x, norm_d, d, inside, normed, out, row, eps, D, P)
            return
    n = (tl.program_id(0) - WRITERS) * BLOCK + tl.arange(0, BLOCK)
    both = (n < E)[:, None] & inside[None, :]
    w = tl.load(gate + n[:, None] * D + d[None, :], mask=both, other=0.0)
    if CHOOSES:
        e = tl.arange(0, ROUTER[2])
        correction = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    wait(IS_LINKED)
    for i in tl.static_range(ROWS):
        x = sum_parts(hidden, parts, i, d, inside, D, PARTS)
        if HAS_NORM:
            scale = norm_scale(tl.sum(x * x), D, eps)
            y = tl.sum(w.to(tl.float32) * (x * norm_d)[None, :], axis=1) * scale
        else:
            y = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
        tl.store(logits + i * E + n, y, mask=n < E)
    if CHOOSES:
        if is_last_program(arrived, (E + BLOCK - 1) // BLOCK):
            for each in range(ROWS):
                choose(logits, correction, experts, weights, each, scaling, ROUTER)
