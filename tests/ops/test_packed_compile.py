"""Kernels of packed weights compile for every kind of GPU, and fit it."""

import json
import os
from pathlib import Path

import commands
import pytest
from interpreter import IS_INTERPRETED, triton

pytestmark = pytest.mark.kernels

SCRIPT = Path(__file__).parents[1] / "support" / "compile_packed_kernels.py"


@pytest.mark.skipif(triton is None, reason="needs triton")
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_nothing_spills(arch, tmp_path):
    """A kernel that spills reads and writes memory for what it meant to keep in registers."""
    from compiling import SHARED_BYTES

    found = commands.run([SCRIPT, arch], env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)})
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert {line["kernel"] for line in lines} >= {"_unpack"}
    assert [line for line in lines if line["stack"]] == []
    assert [line for line in lines if line["shared"] > SHARED_BYTES[arch]] == []
