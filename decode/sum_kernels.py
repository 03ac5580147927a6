"""Triton kernels of a divided step: sums over GPUs that write to each other's memory, each with
what stands around it, so that the chain of linked launches does not end at a sum.

Each process writes its part to the memory of all others, each number in a word with the number of
the sum that it is for: who reads a word sees by that whether it has come, and nothing else has to
be waited for. Parts are added up in the order of the ranks, which gives the same bits everywhere.
Words are written to two places in turn: who has seen the others' words for the next sum knows that
they have read those of the one before.

See `projection_kernels.py`, also for IS_LINKED.

Shapes: B rows, D hidden size, P processes.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.projection_kernels import log_normed, norm_scale, pointer_to, wait
from kimi_linear.ops.runtime import jit, tl


@jit
def next_epoch(epochs, program):
    """int64: the number of a program's sum, which it counts, in 31 bits."""
    epoch = (tl.load(epochs + program) + 1) & 0x7FFFFFFF
    tl.debug_barrier()  # all threads have read it
    tl.store(epochs + program, epoch)
    return epoch


@jit
def send(part, epoch, inboxes, like, i, inside, size, RANK: tl.constexpr, P: tl.constexpr):
    """Write numbers float32 to where the other processes read this one's."""
    word = (epoch << 32) | (part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    for other in tl.static_range(1, P):
        inbox = pointer_to(tl.load(inboxes + (RANK + other) % P), like)
        tl.store(inbox + RANK * size + i, word, mask=inside)


@jit
def receive(inbox, epoch, i, inside):
    """Another process' numbers float32, once they are there."""
    word = tl.load(inbox + i, mask=inside, other=epoch << 32, volatile=True)
    while tl.max(((word >> 32) != epoch).to(tl.int32)) != 0:
        word = tl.load(inbox + i, mask=inside, other=epoch << 32, volatile=True)
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@jit
def sum_kernel(
    part,  # float32 [size], this process'
    inboxes,  # int64 [P]: addresses of int64 [P, size], where each process reads the others' words
    epochs,  # int64 [programs]
    out,  # float32 [size], to be written
    size,
    RANK: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = sum of all processes' parts."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    inbox = pointer_to(tl.load(inboxes + RANK), epochs)
    wait(IS_LINKED)
    epoch = next_epoch(epochs, tl.program_id(0))
    own = tl.load(part + i, mask=inside, other=0.0)
    send(own, epoch, inboxes, epochs, i, inside, size, RANK, P)
    y = tl.zeros([BLOCK], tl.float32)
    for p in tl.static_range(P):
        if p == RANK:
            y += own
        else:
            y += receive(inbox + p * size, epoch, i, inside)
    tl.store(out + i, y, mask=inside)


@jit
def sum_norm_kernel(
    hidden,  # float32 [B, D], added to
    branch,  # [B, PARTS, D]
    norm,  # [D]
    out,  # [B, D], to be written
    inboxes,  # int64 [P]: as in `sum_kernel`, of [P, B, D]
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
    inside, size, i = d < D, tl.num_programs(0) * D, row * D + d
    inbox = pointer_to(tl.load(inboxes + RANK), epochs)
    wait(IS_LINKED)
    epoch = next_epoch(epochs, row)
    own = tl.zeros([PLACES], tl.float32)
    for part in tl.static_range(PARTS):
        numbers = tl.load(branch + (row * PARTS + part) * D + d, mask=inside, other=0.0)
        own += numbers.to(tl.float32)
    own = own.to(out.dtype.element_ty).to(tl.float32)
    send(own, epoch, inboxes, epochs, i, inside, size, RANK, P)
    x = tl.load(hidden + i, mask=inside, other=0.0)
    for p in tl.static_range(P):
        if p == RANK:
            x += own
        else:
            x += receive(inbox + p * size, epoch, i, inside)
    tl.debug_barrier()  # small rows are held by several threads, all of which must have read
    tl.store(hidden + i, x, mask=inside)
    x *= norm_scale(tl.sum(x * x), D, eps)
    x *= tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, x, mask=inside)
    if HAS_LOG:
        log_normed(x, d, inside, row, num_tokens, table, counters, out, D)
