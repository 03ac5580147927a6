"""How a decode step launches Kimi Delta Attention: one token a row, or several.

Shapes: B rows, H heads, K key and value size, S sequences, T tokens of each.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.decode.attention_kernels import kda_kernel, kda_out_kernel
from kimi_linear.decode.delta_rule_kernels import delta_rule_kernel, delta_rule_out_kernel
from kimi_linear.ops.runtime import power_of_two

# rows up to which one launch does all; then columns of a state that a program has, and its warps
KDA_IN_ONE = 4
IN_ONE_BLOCK, IN_ONE_WARPS = 32, 8


class OneToken:
    """One token of each sequence, which states take in at once.

    Args:
        num_sequences, num_tokens: S and T.
        linear: The configuration's `linear_attn_config`.
        block, num_warps: Columns of a state that a program has, and its warps, of two launches.
        options: For all launches, see `linked`.
    """

    def __init__(
        self,
        num_sequences: int,
        num_tokens: int,
        linear: Any,
        block: int,
        num_warps: int,
        options: Any,
        device: torch.device,
    ) -> None:
        self.num_sequences, self.num_tokens, self.options = num_sequences, num_tokens, options
        H, K, B = linear["num_heads"], linear["head_dim"], num_sequences * num_tokens
        self.is_in_one = B <= KDA_IN_ONE
        if self.is_in_one:
            block, num_warps = IN_ONE_BLOCK, IN_ONE_WARPS
        self.block, self.num_warps = min(block, K), num_warps if K >= 128 else 4
        # between the programs of a head
        self.mixed = torch.empty(B, H, K, dtype=torch.float32, device=device)
        self.squares = torch.empty(B, H, K // self.block, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(B, H, dtype=torch.int32, device=device)

    def launch(
        self,
        a: Any,
        table: Tensor,
        counters: Tensor,
        projected: Tensor,
        gates: Tensor | None,
        out: Tensor,
        fixed: tuple[tuple[Tensor, ...], int],
    ) -> None:
        """One layer's.

        Args:
            a: The layer.
            table: Its row, columns of `KDAAddresses`.
            counters: [sequences, 4], columns of `Counters`.
            projected: [B, ..], the layer's projections of its input, side by side.
            gates: [B, 2, H * K]; None: the kernels project them.
            out: [B, H * K], the gated heads.
            fixed: Where they go in fixed point too, and its places.
        """
        H, K, width = a.num_heads, a.head_dim, a.q_conv1d.weight.shape[-1]
        rule, gated_norm = self._kernels()
        counts, tokens = self._of_several(counters)
        sizes = {"FIXED": fixed[1], "H": H, "K": K, "WIDTH": width, **self._places(width)}
        sizes |= {"HAS_GATES": gates is not None, "num_warps": self.num_warps, **self.options}
        both = projected, projected if gates is None else gates
        ends = a.g_b_proj.weight, a.o_norm.weight
        strides = projected.stride(0), out.stride(0)
        rule[(self.num_sequences, H, K // self.block)](
            *both,
            *_weights(a),
            *ends,
            table,
            *counts,
            self.mixed,
            self.squares,
            self.arrived,
            out,
            *fixed[0],
            *strides,
            *tokens,
            a.o_norm.eps,
            BLOCK=self.block,
            IN_ONE=self.is_in_one,
            **sizes,
        )
        if self.is_in_one:
            return
        gated_norm[(out.shape[0], H)](
            *both,
            *ends,
            table,
            *counts,
            self.mixed,
            out,
            *fixed[0],
            *strides,
            *tokens,
            a.o_norm.eps,
            **sizes,
        )

    def _kernels(self) -> tuple[Any, Any]:
        """Of the rule, and of the gated norm behind it."""
        return kda_kernel, kda_out_kernel

    def _of_several(self, counters: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """What only kernels of several tokens take: counters, and the number of tokens."""
        return (), ()

    def _places(self, width: int) -> dict[str, int]:
        """Inputs of a convolution that a program loads at once."""
        return {"TAPS": power_of_two(width - 1)}


class SeveralTokens(OneToken):
    """Several tokens of each sequence, or one that may be taken back."""

    def _kernels(self) -> tuple[Any, Any]:
        return delta_rule_kernel, delta_rule_out_kernel

    def _of_several(self, counters: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (counters,), (self.num_tokens,)

    def _places(self, width: int) -> dict[str, int]:
        return {"PLACES": power_of_two(width)}


def _weights(a: Any) -> tuple[Tensor, ...]:
    """What the rule itself takes of a layer."""
    taps = (conv.weight for conv in (a.q_conv1d, a.k_conv1d, a.v_conv1d))
    return (*taps, a.f_b_proj.weight, a.A_log, a.dt_bias)
