"""Compile the kernels of packed weights for one kind of GPU without having one.

    python tests/support/compile_packed_kernels.py 90

A line of JSON for each compiled kernel says what it takes (`compiling.resources`). All are compiled
with PTX of their own, for each way to hold weights and both dtypes.
"""

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from compiling import Target, replace_kernels, resources

from kimi_linear.ops.packed import unpacking
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme

SCHEMES = {
    "3 bits": Scheme(3, 64),
    "3 bits, zeros": Scheme(3, 64, is_symmetric=False),
    "4 bits": Scheme(4, 64),
    "4 bits, zeros": Scheme(4, 64, is_symmetric=False),
    "4 bits a row": Scheme(4, None),
    "8 bits": Scheme(8, 128),
    "8 bits a row": Scheme(8, None),
    "float8 a row": Scheme(8, None, is_float=True),
    "float8 blocks": Scheme(8, 128, is_float=True, rows=128),
}
DTYPES = (torch.bfloat16, torch.float16)
# Outputs and inputs of a matrix: the 48B model's, and one whose tiles and blocks are cut short.
SIZES = ((2304, 2304), (40, 448))


def packed(scheme: Scheme, dtype: torch.dtype, *shape: int) -> PackedWeights:
    """Weights of any numbers."""
    return PackedWeights.empty(shape, scheme, dtype, "cpu")


# Module, its kernels' names, and what launches them; of a scheme, a dtype, and outputs and inputs.
Launch = Callable[[Scheme, torch.dtype, int, int], Any]
KERNELS: list[tuple[Any, list[str], Launch]] = [
    (unpacking, ["_unpack"], lambda s, t, n, k: unpacking.unpack_on_gpu(packed(s, t, 2, n, k))),
]


def main(arch: int) -> None:
    Target(arch)
    for module, names, launch in KERNELS:
        kernels = replace_kernels(module, names)
        module.has_asm = lambda *_: True  # as on CUDA, though tensors are on a CPU
        cases = itertools.product(SCHEMES.items(), DTYPES, SIZES)
        for (title, scheme), dtype, (num_outputs, num_inputs) in cases:
            if scheme.rows == 1 and num_inputs % (scheme.group or 1):
                continue  # groups must divide the inputs
            launch(scheme, dtype, num_outputs, num_inputs)
            case = {"scheme": title, "dtype": str(dtype)[6:], "inputs": num_inputs}
            for name, kernel in zip(names, kernels, strict=True):
                for compiled in kernel.compiled:
                    print(json.dumps({"kernel": name, **case, **resources(compiled)}), flush=True)
                kernel.compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]))
