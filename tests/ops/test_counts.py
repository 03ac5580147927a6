"""Kernels of prompts and of training are compiled once for all numbers of tokens."""

import importlib
import pkgutil

import pytest

from kimi_linear import ops
from kimi_linear.ops.launch import is_jit_function

pytestmark = pytest.mark.kernels
COUNTS = {"num_tokens", "num_pairs", "num_rows", "T", "N"}


def functions():
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        for each in vars(importlib.import_module(module.name)).values():
            if is_jit_function(each):
                yield each


def test_counts_choose_no_kernel():
    found = {
        (each.fn.__name__, param.name): param.do_not_specialize
        for each in functions()
        for param in each.params
        if param.name in COUNTS and not param.is_constexpr
    }
    if not found:
        pytest.skip("no triton that compiles")
    # what other kernels call is compiled as part of them; a weight has the same size each time
    others = {("_own_experts", "num_pairs"), ("_row", "num_tokens"), ("_sequence_of", "N")}
    others.add(("_unpack", "N"))
    assert [name for name, is_free in found.items() if not is_free and name not in others] == []
    assert ("_place_pairs", "num_pairs") in found
