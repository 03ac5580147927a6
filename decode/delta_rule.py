"""How a decode step launches Kimi Delta Attention: one token a row, or several.

Shapes: B rows, H heads, K key and value size, T tokens of a sequence.
"""

from typing import Any

from torch import Tensor

from kimi_linear.decode.attention_kernels import kda_kernel, kda_out_kernel
from kimi_linear.decode.delta_rule_kernels import delta_rule_kernel, delta_rule_out_kernel
from kimi_linear.ops.runtime import power_of_two

# of several tokens: columns of a state that a program has, and its warps
SEVERAL_BLOCK, SEVERAL_WARPS = 64, 8


class OneToken:
    """One token of each sequence, which states take in at once.

    Args:
        num_sequences: B.
        block, num_warps: Columns of a state that a program has, and its warps.
        options: For all launches, see `linked`.
    """

    def __init__(self, num_sequences: int, block: int, num_warps: int, options: Any) -> None:
        self.num_sequences, self.block = num_sequences, block
        self.num_warps, self.options = num_warps, options

    def launch(
        self,
        a: Any,
        table: Tensor,
        counters: Tensor,
        projected: Tensor,
        gates: Tensor | None,
        mixed: Tensor,
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
            mixed: float32 [B, H * K], between both kernels.
            out: [B, H * K], the gated heads.
            fixed: Where they go in fixed point too, and its places.
        """
        H, K, width = a.num_heads, a.head_dim, a.q_conv1d.weight.shape[-1]
        block = min(self.block, K)
        rule, gated_norm = self._kernels()
        counts, tokens = self._of_several(counters)
        sizes = {"H": H, "K": K, "WIDTH": width}
        sizes |= {"HAS_GATES": gates is not None, "num_warps": self._warps(K), **self.options}
        both = projected, projected if gates is None else gates
        rule[(K // block, H, self.num_sequences)](
            *both,
            *_weights(a),
            table,
            *counts,
            mixed,
            projected.stride(0),
            *tokens,
            BLOCK=block,
            **self._places(),
            **sizes,
        )
        gated_norm[(H, out.shape[0])](
            *both,
            a.g_b_proj.weight,
            a.o_norm.weight,
            table,
            *counts,
            mixed,
            out,
            *fixed[0],
            projected.stride(0),
            out.stride(0),
            *tokens,
            a.o_norm.eps,
            FIXED=fixed[1],
            TAPS=power_of_two(width - 1),
            **sizes,
        )

    def _kernels(self) -> tuple[Any, Any]:
        """Of the rule, and of the gated norm behind it."""
        return kda_kernel, kda_out_kernel

    def _of_several(self, counters: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """What only kernels of several tokens take: counters, and the number of tokens."""
        return (), ()

    def _places(self) -> dict[str, int]:
        """What the rule of several tokens loads at once."""
        return {}

    def _warps(self, head_size: int) -> int:
        return self.num_warps if head_size >= 128 else 4


class SeveralTokens(OneToken):
    """Several tokens of each sequence, or one that may be taken back.

    Args:
        num_tokens: T.
    """

    def __init__(self, *args: Any, num_tokens: int) -> None:
        super().__init__(*args)
        self.num_tokens = num_tokens
        if num_tokens > 1:
            self.block, self.num_warps = SEVERAL_BLOCK, SEVERAL_WARPS

    def _kernels(self) -> tuple[Any, Any]:
        return delta_rule_kernel, delta_rule_out_kernel

    def _of_several(self, counters: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (counters,), (self.num_tokens,)

    def _places(self) -> dict[str, int]:
        return {"TOKENS": power_of_two(self.num_tokens)}


def _weights(a: Any) -> tuple[Tensor, ...]:
    """What both kernels of the rule take of a layer."""
    taps = (conv.weight for conv in (a.q_conv1d, a.k_conv1d, a.v_conv1d))
    return (*taps, a.f_b_proj.weight, a.A_log, a.dt_bias)
