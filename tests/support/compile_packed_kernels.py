"""Compile the kernels of packed weights for one kind of GPU without having one.

    python tests/support/compile_packed_kernels.py 90 decode "3 bits" "8 bits"

A line of JSON for each compiled kernel says what it takes (`compiling.resources`). All are compiled
with PTX of their own. A further kernel is a line of `KERNELS`, and its group a line of the test's
(`tests/ops/test_packed_compile.py`).
"""

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from compile_kernels import real_sizes
from compiling import Skipped, Target, replace_kernels, resources
from packed_models import every_part, fill_with_packed

from kimi_linear.decode import delta_rule, few_rows, fixed_point, many_rows, packed_few_rows
from kimi_linear.decode import packed as packed_step
from kimi_linear.decode import step as decode_steps
from kimi_linear.decode.recording import StepKind, decode_step
from kimi_linear.ops.experts import float8_kernels
from kimi_linear.ops.experts import packed_kernels as packed_experts
from kimi_linear.ops.packed import float8, unpacking
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
    "float8 a row": Scheme(8, None, is_float=True, activation_scheme="dynamic"),
    "float8 blocks": Scheme(8, 128, is_float=True, rows=128, activation_scheme="dynamic"),
}
DTYPES = (torch.bfloat16, torch.float16)
# Outputs and inputs of a matrix: the 48B model's, and one whose tiles and blocks are cut short.
SIZES = ((2304, 2304), (40, 448))
FEW_ROWS, MANY_ROWS = (1, 4), (40,)
# PTX of products by tensor cores
PRODUCTS = re.compile(r"\b((?:wgmma\.mma_async|mma|tcgen05\.mma)\.[\w.:]+)")


def unpack(scheme: Scheme, dtype: torch.dtype) -> None:
    """Write weights out in full."""
    for num_outputs, num_inputs in SIZES:
        if scheme.rows > 1 or num_inputs % (scheme.group or 1) == 0:
            shape = (2, num_outputs, num_inputs)
            unpacking.unpack_on_gpu(PackedWeights.empty(shape, scheme, dtype, "cpu"))


def decode(all_rows: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
    """Steps for these numbers of rows, of a model with these weights."""
    if dtype != torch.bfloat16:  # which costs no less, and differs in few instructions
        return
    model = real_sizes()
    fill_with_packed(model, every_part(scheme, scheme), "cpu")
    for num_rows in all_rows:
        for num_tokens in (1, 2) if num_rows == 1 else (1,):
            decode_step(model, StepKind(num_rows, num_tokens=num_tokens)).run()


def prefill(scheme: Scheme, dtype: torch.dtype) -> None:
    """Both products of many tokens' experts."""
    D, I, E, k = 2304, 1024, 16, 8  # noqa: E741
    order, ends = torch.zeros(64 * k, dtype=torch.int64), torch.zeros(E, dtype=torch.int32)
    weights = [
        PackedWeights.empty(size, scheme, dtype, "cpu") for size in ((E, 2 * I, D), (E, D, I))
    ]
    packed_experts.gate_up(torch.zeros(64, D, dtype=dtype), order, ends, weights[0], k)
    packed_experts.down(torch.zeros(64 * k, I, dtype=dtype), order, ends, weights[1])


def float8_products(scheme: Scheme, dtype: torch.dtype) -> None:
    """Products of quantised rows: of linear layers, and of experts with few and many rows."""
    if not scheme.has_float8_products:
        return
    D, I, E, k = 2304, 1024, 16, 8  # noqa: E741
    for num_rows in (64, 1024):
        x = torch.zeros(num_rows, D, dtype=dtype)
        linear = PackedWeights.empty((4096, D), scheme, dtype, "cpu")
        float8.float8_linear(float8.quantize_rows(x), linear, dtype)
        order = torch.zeros(num_rows * k, dtype=torch.int64)
        rows = float8.quantize_rows(x, order.view(num_rows, k))
        ends = torch.zeros(E, dtype=torch.int32)
        up, down = (
            PackedWeights.empty(s, scheme, dtype, "cpu") for s in ((E, 2 * I, D), (E, D, I))
        )
        inner = float8_kernels.gate_up(rows, ends, up)
        float8_kernels.down(inner, order, ends, down, dtype)


# By group: its kernels, by module, and what launches them for a scheme and a dtype.
KERNELS: dict[str, tuple[dict[Any, list[str]], Callable[[Scheme, torch.dtype], Any]]] = {
    "unpack": ({unpacking: ["_unpack"]}, unpack),
    "prefill": ({packed_experts: ["_packed_gate_up", "_packed_down"]}, prefill),
    "float8": (
        {
            float8: ["_quantize_rows", "_float8_linear"],
            float8_kernels: ["_float8_gate_up", "_float8_down"],
        },
        float8_products,
    ),
    "decode": (
        {packed_step: ["packed_project_kernel", "packed_in_kernel", "packed_out_kernel"]},
        functools.partial(decode, MANY_ROWS),
    ),
    "decode, few rows": (
        {
            fixed_point: ["fixed_project_kernel"],
            packed_few_rows: [
                "add_norm_fixed_kernel",
                "add_norm_score_kernel",
                "fixed_in_kernel",
                "fixed_out_kernel",
            ],
            delta_rule: ["kda_out_kernel", "delta_rule_out_kernel"],
            decode_steps: ["attend_kernel", "mix_kernel"],
        },
        functools.partial(decode, FEW_ROWS),
    ),
}


def skip_other_kernels(arch: int, modules: dict[Any, list[str]]) -> None:
    """Those of a step that other groups or `compile_kernels.py` compile, and products that only
    CUDA has."""
    for module in (decode_steps, delta_rule, few_rows, many_rows, packed_step):
        for name in vars(module):
            if name.endswith("_kernel") and name not in modules.get(module, ()):
                setattr(module, name, Skipped())
    decode_steps.can_link = lambda device: arch >= 90
    many_rows.ManyRowsStep._wide_product = lambda self, weight, out: None


@torch.no_grad()
def main(arch: int, group: str, names: list[str]) -> None:
    """Compile a group of kernels for the schemes of these names, or all."""
    Target(arch)
    unpacking.has_asm = lambda *_: True  # as on CUDA, though tensors are on a CPU
    modules, launch = KERNELS[group]
    skip_other_kernels(arch, modules)
    kernels = [
        (name, replace_kernels(module, [name])[0])
        for module, kernel_names in modules.items()
        for name in kernel_names
    ]
    for title, dtype in itertools.product(names or SCHEMES, DTYPES):
        launch(SCHEMES[title], dtype)
        case = {"arch": arch, "scheme": title, "dtype": str(dtype)[6:]}
        for name, kernel in kernels:
            for compiled in {each.hash: each for each in kernel.compiled}.values():
                found = {"kernel": name, **case, **resources(compiled)}
                if group == "float8":
                    found["products"] = sorted(set(PRODUCTS.findall(compiled.asm["ptx"])))
                print(json.dumps(found), flush=True)
            kernel.compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
