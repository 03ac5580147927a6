"""Triton kernels of a divided step: sums over GPUs that read each other's memory, each with what
stands around it, so that the chain of linked launches does not end at a sum.

Each process writes its part to memory that the others can read, raises a flag in the memory of
each of them, waits for theirs, and adds all parts up in the order of the ranks, which gives the
same bits everywhere. A program needs of the others the part of the program with its number only,
and waits for no more. A part is written to two places in turn: who has seen the others' next flag
knows that they have read the one before.

See `projection_kernels.py`, also for IS_LINKED.

Shapes: B rows, D hidden size, P processes.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.projection_kernels import log_normed, norm_scale, pointer_to, wait
from kimi_linear.ops.runtime import jit, tl


@jit
def meet(flags, epochs, program, num_programs, RANK: tl.constexpr, P: tl.constexpr):
    """Tell the other processes that this program's part is written; wait until theirs are."""
    epoch = tl.load(epochs + program) + 1
    tl.debug_barrier()  # all threads have read it, and written their part
    tl.store(epochs + program, epoch)
    for i in tl.static_range(1, P):
        other = (RANK + i) % P
        flag = pointer_to(tl.load(flags + other), epochs) + RANK * num_programs + program
        tl.atomic_xchg(flag, epoch, sem="release", scope="sys")
    own = pointer_to(tl.load(flags + RANK), epochs) + program
    for i in tl.static_range(1, P):
        flag = own + (RANK + i) % P * num_programs
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        while seen < epoch:
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@jit
def sum_kernel(
    parts,  # int64 [P]: addresses of float32 [size]
    flags,  # int64 [P]: addresses of int64 [P, programs]
    epochs,  # int64 [programs]
    out,  # float32 [size], to be written
    size,
    RANK: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = sum of all processes' parts, of which the kernels before have written this one's."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(IS_LINKED)
    meet(flags, epochs, tl.program_id(0), tl.num_programs(0), RANK, P)
    y = tl.zeros([BLOCK], tl.float32)
    for p in tl.static_range(P):
        part = pointer_to(tl.load(parts + p), out)
        y += tl.load(part + i, mask=i < size, other=0.0, volatile=True)
    tl.store(out + i, y, mask=i < size)


@jit
def sum_norm_kernel(
    hidden,  # float32 [B, D], added to
    branch,  # [B, PARTS, D]
    norm,  # [D]
    out,  # [B, D], to be written
    parts,  # int64 [P]: addresses of [B, D]
    flags,  # int64 [P]: addresses of int64 [P, B]
    epochs,  # int64 [B]
    table,  # int64, columns of `KDAAddresses`; its log takes the normed rows
    counters,  # int64 [B / T, 4], columns of `Counters`
    eps,
    num_tokens,  # T
    D: tl.constexpr,
    PLACES: tl.constexpr,  # D, or more, a power of two
    PARTS: tl.constexpr,
    HAS_LOG: tl.constexpr,
    RANK: tl.constexpr,
    P: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """hidden += sum of the branch's parts of all processes; out = norm(hidden); a row by program.

    A process' own parts are summed before, and rounded as layer by layer.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PLACES)
    inside = d < D
    wait(IS_LINKED)
    own = tl.zeros([PLACES], tl.float32)
    for i in tl.static_range(PARTS):
        part = tl.load(branch + (row * PARTS + i) * D + d, mask=inside, other=0.0)
        own += part.to(tl.float32)
    tl.store(pointer_to(tl.load(parts + RANK), out) + row * D + d, own, mask=inside)
    meet(flags, epochs, row, tl.num_programs(0), RANK, P)
    x = tl.load(hidden + row * D + d, mask=inside, other=0.0)
    for p in tl.static_range(P):
        part = pointer_to(tl.load(parts + p), out) + row * D + d
        x += tl.load(part, mask=inside, other=0.0, volatile=True).to(tl.float32)
    tl.debug_barrier()  # small rows are held by several threads, all of which must have read
    tl.store(hidden + row * D + d, x, mask=inside)
    x *= norm_scale(tl.sum(x * x), D, eps)
    x *= tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, x, mask=inside)
    if HAS_LOG:
        log_normed(x, d, inside, row, num_tokens, table, counters, out, D)
