"""Compile the kernels for a Hopper GPU without having one.

Triton's interpreter runs what its compiler refuses, such as a name of two types. A process of its
own does this, since it takes the place of Triton's driver.
"""

from typing import Any

import torch
import triton
from compiling import Target, replace_kernels
from decode_models import decode_model

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.decode import delta_rule, divided, few_rows, many_rows
from kimi_linear.decode import step as decode_steps
from kimi_linear.decode.recording import StepKind, decode_step
from kimi_linear.ops import gated_norm, gated_silu
from kimi_linear.ops.cross_entropy import kernels as loss_kernel
from kimi_linear.ops.experts import choice_kernels, prefill_kernels, row_sums, sort
from kimi_linear.ops.short_conv import prefill_kernels as conv_kernel
from kimi_linear.ops.short_conv import training_kernels as conv_training_kernels
from kimi_linear.parallel import sums

KERNELS = {
    choice_kernels: ["_choose_experts", "_choice_backward"],
    conv_kernel: ["_convolve", "_convolve_packed"],
    conv_training_kernels: ["_convolve_columns", "_convolve_columns_backward"],
    gated_norm: ["_gated_norm", "_gated_norm_backward"],
    gated_silu: ["_gated_silu", "_gated_silu_backward"],
    loss_kernel: ["_loss_and_gradient"],
    prefill_kernels: ["_gate_up", "_down"],
    row_sums: ["_weighted_sum", "_sum_of_rows"],
    sort: ["_count_pairs", "_place_pairs"],
}


def compile_all(dtype: torch.dtype) -> None:
    """Once with the 48B model's sizes, once with sizes that need masks."""
    for D, I, E, k in ((2304, 1024, 256, 8), (40, 64, 6, 3)):  # noqa: E741
        x, inner = torch.zeros(2, D, dtype=dtype), torch.zeros(2 * k, I, dtype=dtype)
        order, ends = torch.zeros(2 * k, dtype=torch.int64), torch.zeros(E, dtype=torch.int32)
        prefill_kernels.gate_up(x, order, ends, torch.zeros(E, 2 * I, D, dtype=dtype), k)
        prefill_kernels.down(inner, order, ends, torch.zeros(E, D, I, dtype=dtype))
        weights, experts = choice_kernels.launch_choice(
            torch.zeros(2, E), torch.zeros(E), k, True, 2.4
        )
        row_sums.weighted_sum(torch.zeros(2 * k, D, dtype=dtype), weights, experts, E)
        gated_silu.launch_gated_silu(inner, inner)
        both = torch.zeros(2 * k, 2 * I, dtype=dtype)
        gated_silu.launch_gated_silu_backward(both, inner, weights, order)
        rows = torch.zeros(2 * k, D, dtype=dtype)
        for each in (weights, None):
            row_sums.launch_sum_of_rows(rows, experts, each)
        for state in (None, torch.zeros(1, 3, D, 3, dtype=dtype)):
            taps = [torch.zeros(D, 1, 4, dtype=dtype)] * 3
            conv_kernel.convolve_three([x[None]] * 3, taps, state, D // 8)
            ends = torch.tensor([0, 2], dtype=torch.int32)
            conv_kernel.convolve_three([x[None]] * 3, taps, state, D // 8, ends)
        states = torch.zeros(3, 3, D, 3, dtype=dtype)
        ends = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
        conv_kernel.convolve_three([x[None]] * 3, taps, states, D // 8, ends)
        gated_silu.launch_gated_silu_backward(both, inner)
        sort.launch_sort_pairs(experts, E)
        heads, weight = torch.zeros(2, 3, D // 8, dtype=dtype), torch.zeros(D // 8, dtype=dtype)
        gated_norm.launch_gated_norm(heads, heads, weight, 1e-5)
        gated_norm.launch_gated_norm_backward(heads, heads, heads, weight, 1e-5)
        logits = torch.zeros(2, E)
        choice_kernels.launch_choice_backward(logits, experts, weights, True, 2.4)
        columns, taps = torch.zeros(2, 3 * D + 16, dtype=dtype), torch.zeros(3, D, 4, dtype=dtype)
        for starts in (None, torch.zeros(2, dtype=torch.int32)):
            parts = conv_training_kernels.convolve_columns(columns, taps, starts, 2, D // 8)
            conv_training_kernels.convolve_columns_backward(
                parts, columns, taps, starts, 2, D // 8, columns.clone()
            )
    for V in (97, 163840):
        logits, labels = torch.zeros(2, V), torch.zeros(2, dtype=torch.int64)
        for out in (dtype, torch.float32):
            loss_kernel.loss_and_gradient(logits, labels, torch.ones(()), -100, out)


def real_sizes() -> KimiLinearForCausalLM:
    """Two layers with the 48B model's attention and experts, few of these; weights are not set."""
    linear = dict(KimiLinearConfig.from_preset("48b-a3b").linear_attn_config)
    linear["full_attn_layers"], linear["kda_layers"] = [2], [1]
    few = {"num_hidden_layers": 2, "num_experts": 16, "vocab_size": 97}
    config = KimiLinearConfig.from_preset("48b-a3b", linear_attn_config=linear, **few)
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config).to(torch.bfloat16)
    return model.to_empty(device="cpu")


class SecondOfTwo:
    """In the place of a group of processes."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


class NotShared:
    """In the place of a `SharedMemory`."""

    def __init__(self, shape: Any, dtype: torch.dtype, device: torch.device, group: Any) -> None:
        self.own = torch.zeros(*shape, dtype=dtype)

    def of(self, rank: int) -> torch.Tensor:
        return self.own

    def settle(self) -> None: ...


class NotGathered:
    """In the place of a `SharedGather`."""

    def __init__(self, part: torch.Tensor, group: Any) -> None:
        self.part = part

    def run(self, out: torch.Tensor) -> None: ...


@torch.no_grad()
def compile_decode_steps() -> None:
    """Few rows and more, with padding and without, of one token and of several, for both kinds of
    sizes."""
    for module in (decode_steps, delta_rule, divided, few_rows, many_rows):
        replace_kernels(module, [name for name in vars(module) if name.endswith("_kernel")])
    decode_steps.can_link = lambda device: True
    sums.SHARING_DEVICES, sums.SharedMemory = ("cpu",), NotShared
    divided.make_gather = NotGathered
    # a product that only CUDA has
    many_rows.ManyRowsStep._wide_product = lambda self, weight, out: None
    small = decode_model("cpu", num_shared_experts=2).to(torch.bfloat16)
    for model in (small, real_sizes()):
        for num_rows in (1, 4, 6, 40):
            decode_step(model, StepKind(num_rows, has_padding=num_rows == 6)).run()
        for num_sequences in (1, 2):
            decode_step(model, StepKind(num_sequences, num_tokens=3)).run()
        decode_step(model, StepKind(2, is_pending=True, page_tokens=256)).run()
        for num_rows in (1, 4):
            decode_step(model, StepKind(num_rows), SecondOfTwo()).run()


if __name__ == "__main__":
    Target(90)
    for module, names in KERNELS.items():
        replace_kernels(module, names)
    compile_all(torch.bfloat16)
    compile_decode_steps()
    print(f"compiled with triton {triton.__version__}")
