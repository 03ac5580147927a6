"""The pairs of a token and one of its experts, sorted by expert: a counting sort in two kernels.

A sort of the library's takes eleven launches, and five more follow for what is asked of it. Here a
program counts the experts of its pairs, a running sum over all counts says where each program's
pairs of each expert begin, and a second program puts its pairs there. Stable.

Shapes: T tokens, k experts of one token, P = T * k pairs, E experts, S programs.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import ceil_div, jit, power_of_two, tl, triton

PAIRS = 256  # of a program


class SortedPairs(NamedTuple):
    """Pairs by expert; those with an out-of-range expert, of number E or more, come last.

    Attributes:
        order: [P] int64, numbers token * k + slot of the pairs.
        ends: [E] int32, where each expert's pairs end.
        tokens: [P] int64, tokens of the pairs.
        places: [T, k] int64, where each pair is among them.
    """

    order: Tensor
    ends: Tensor
    tokens: Tensor
    places: Tensor


def sort_pairs(experts: Tensor, num_experts: int) -> SortedPairs:
    """Experts [T, k] of the tokens, by expert."""
    if triton is None or not experts.is_cuda or torch.compiler.is_compiling():
        return reference_sort_pairs(experts, num_experts)
    return launch_sort_pairs(experts, num_experts)


def reference_sort_pairs(experts: Tensor, num_experts: int) -> SortedPairs:
    """`sort_pairs` by torch's sort."""
    keys, order = experts.flatten().clamp(max=num_experts).to(torch.int16).sort(stable=True)
    numbers = torch.arange(num_experts, dtype=torch.int16, device=experts.device)
    ends = torch.searchsorted(keys, numbers, right=True, out_int32=True)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return SortedPairs(order, ends, order // experts.shape[1], places.view_as(experts))


def launch_sort_pairs(experts: Tensor, num_experts: int) -> SortedPairs:
    (T, k), experts = experts.shape, experts.contiguous()
    programs = max(1, ceil_div(T * k, PAIRS))
    counts = experts.new_empty((num_experts + 1) * programs, dtype=torch.int32)
    order, tokens, places = experts.new_empty(3, T * k, dtype=torch.int64).unbind()
    ends = experts.new_empty(num_experts, dtype=torch.int32)
    pairs = SortedPairs(order, ends, tokens, places.view(T, k))
    sizes = {"PAIRS": PAIRS, "BINS": power_of_two(num_experts + 1)}
    with torch.cuda.device_of(experts):
        _count_pairs[(programs,)](experts, counts, T * k, num_experts, **sizes)
        begins = counts.cumsum(0, dtype=torch.int32)
        _place_pairs[(programs,)](experts, begins, *pairs, T * k, num_experts, k, **sizes)
    return pairs


@jit
def _own_experts(experts, num_pairs, num_experts, PAIRS: tl.constexpr):
    """Its pairs and their experts; E for pairs past the end and experts out of range."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=num_experts)
    return pair, tl.minimum(expert, num_experts).to(tl.int32)


@launch_directly
@jit(counts=("num_pairs",))
def _count_pairs(experts, counts, num_pairs, num_experts, PAIRS: tl.constexpr, BINS: tl.constexpr):
    _, expert = _own_experts(experts, num_pairs, num_experts, PAIRS)
    number = tl.arange(0, BINS)
    place = counts + number * tl.num_programs(0) + tl.program_id(0)
    tl.store(place, tl.histogram(expert, BINS), mask=number <= num_experts)


@launch_directly
@jit(counts=("num_pairs",))
def _place_pairs(
    experts,
    begins,
    order,
    ends,
    tokens,
    places,
    num_pairs,
    num_experts,
    num_chosen,
    PAIRS: tl.constexpr,
    BINS: tl.constexpr,
):
    pair, expert = _own_experts(experts, num_pairs, num_experts, PAIRS)
    # the sum up to and without this program's count of this expert
    before = expert * tl.num_programs(0) + tl.program_id(0) - 1
    place = tl.load(begins + before, mask=before >= 0, other=0)
    other = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_real = other < num_pairs
    theirs = tl.load(experts + other, mask=is_real, other=num_experts)
    theirs = tl.minimum(theirs, num_experts).to(tl.int32)
    is_earlier = (theirs[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])
    place += tl.sum(is_earlier.to(tl.int32), axis=1)
    inside = pair < num_pairs
    tl.store(order + place, pair.to(tl.int64), mask=inside)
    tl.store(tokens + place, (pair // num_chosen).to(tl.int64), mask=inside)
    tl.store(places + pair, place.to(tl.int64), mask=inside)
    if tl.program_id(0) == 0:
        number = tl.arange(0, BINS)
        last = (number + 1) * tl.num_programs(0) - 1
        mask = number < num_experts
        tl.store(ends + number, tl.load(begins + last, mask=mask, other=0), mask=mask)
