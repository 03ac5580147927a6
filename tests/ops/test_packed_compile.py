"""Kernels of packed weights compile for every kind of GPU, and fit it."""

import json
import os
from pathlib import Path

import commands
import pytest
from interpreter import IS_INTERPRETED, triton

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(triton is None, reason="needs triton"),
    pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile"),
]

SCRIPT = Path(__file__).parents[1] / "support" / "compile_packed_kernels.py"
# Compute capabilities of 8.0 to 8.9 are compiled for alike, and the last two have less memory.
SOME = (86, 90)
EACH = (80, 86, 89, 90, 120)
# Groups of kernels (`compile_packed_kernels.KERNELS`), and for which GPUs they are compiled.
GROUPS = {"unpack": EACH, "decode": SOME}
# What is known to spill, or to want more shared memory than there is.
TOO_LARGE = {"decode": "packed_project_kernel is too large for 40 rows of 3 and 4 bits"}


def cases():
    for group, arches in GROUPS.items():
        marks = []
        if group in TOO_LARGE:
            reason = TOO_LARGE[group]
            marks = [pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)]
        for arch in arches:
            yield pytest.param(group, arch, marks=marks, id=f"{group}-{arch}")


@pytest.mark.parametrize(("group", "arch"), list(cases()))
def test_nothing_spills(group, arch, tmp_path):
    """A kernel that spills keeps in memory what it meant to keep in registers."""
    from compiling import SHARED_BYTES

    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = commands.run([SCRIPT, arch, group], env=environment)
    if found.returncode:  # which is never expected
        pytest.fail(found.stdout + found.stderr)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert lines
    assert [line for line in lines if line["stack"]] == []
    assert [line for line in lines if line["shared"] > SHARED_BYTES[arch]] == []
