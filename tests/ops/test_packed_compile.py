"""Kernels of packed weights compile for every kind of GPU, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import IS_INTERPRETED, triton

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(triton is None, reason="needs triton"),
    pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile"),
]

# Bytes of a thread's stack: what is put aside once, outside of loops.
FEW_REGISTERS = 96
SUPPORT = Path(__file__).parents[1] / "support"
# Groups of kernels (`compile_packed_kernels.KERNELS`), compute capabilities, and ways to hold
# weights; none: all of them. Of 8.0 to 8.9 the last two have the least memory.
CASES = [
    *(("unpack", arch, ()) for arch in (80, 86, 89, 90, 120)),
    ("prefill", 80, ("8 bits",)),
    ("prefill", 86, ("3 bits", "8 bits")),
    ("prefill", 89, ("4 bits, zeros",)),
    ("prefill", 90, ("3 bits", "8 bits")),
    ("prefill", 120, ("3 bits",)),
    ("float8", 89, ("float8 blocks",)),
    ("float8", 90, ("float8 blocks",)),
    ("float8", 120, ("float8 a row",)),
    ("decode", 86, ("3 bits",)),  # of the preset for cards of 24 GB
    ("decode", 90, ("4 bits, zeros",)),
    ("decode, few rows", 80, ("4 bits, zeros",)),
    ("decode, few rows", 86, ("3 bits",)),
    ("decode, few rows", 89, ("float8 blocks",)),
    ("decode, few rows", 90, ("4 bits",)),
]


@pytest.mark.parametrize(
    ("group", "arch", "schemes"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in CASES]
)
def test_kernels_fit(group, arch, schemes, tmp_path):
    """A kernel that spills keeps in memory what it meant to keep in registers; one that wants more
    shared memory than there is cannot be launched."""
    from compiling import SHARED_BYTES

    command = [sys.executable, SUPPORT / "compile_packed_kernels.py", str(arch), group, *schemes]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:  # which is never expected
        pytest.fail(found.stdout + found.stderr)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert lines
    # in loops: Triton 3.6 keeps some sums of two tiles of 128 x 128 there, which are worth it
    allowed = {"_float8_gate_up": 160, "_float8_down": 160}
    assert [x for x in lines if x["stack"] > allowed.get(x["kernel"], FEW_REGISTERS)] == []
    if group == "float8":
        kind = "wgmma.mma_async" if arch == 90 else "mma.sync"
        products = {each for line in lines for each in line["products"]}
        assert products and all(p.startswith(kind) and ".e4m3.e4m3" in p for p in products)
    assert [line for line in lines if line["shared"] > SHARED_BYTES[arch]] == []
