"""Kimi Delta Attention, section 3 of arXiv 2510.26692.

Shapes: B batch, T tokens of this call, R real tokens of a packed call (B = 1), D hidden size,
H heads, K head size, W convolution width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.cache.state import KDAState
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.layers.norm import KimiLinearGatedRMSNorm
from kimi_linear.layers.plan import ForwardPlan
from kimi_linear.ops.kda import kda_attention_and_cut
from kimi_linear.ops.projections import project
from kimi_linear.ops.short_conv import convolved_projections
from kimi_linear.ops.short_conv.convolution import short_convolution
from kimi_linear.upstream.arguments import LAYER_ARGUMENTS, check_arguments


class KimiLinearShortConv(nn.Module):
    """Causal depthwise convolution over the last W tokens, followed by SiLU."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, width))

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to [B, T, D] and the state after it, see `short_convolution`."""
        return short_convolution(x, self.weight, **kwargs)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class KimiLinearDeltaAttention(nn.Module):
    """Kimi Delta Attention: a delta rule whose state decays per key channel (equation 1)."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        linear = config.linear_attn_config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = linear["num_heads"], linear["head_dim"]
        hidden, inner = config.hidden_size, self.num_heads * self.head_dim
        width = linear["short_conv_kernel_size"]
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.q_conv1d = KimiLinearShortConv(inner, width)
        self.k_conv1d = KimiLinearShortConv(inner, width)
        self.v_conv1d = KimiLinearShortConv(inner, width)
        self.A_log = nn.Parameter(torch.empty(1, 1, self.num_heads, 1, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.f_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.f_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.o_norm = KimiLinearGatedRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def forward(
        self, hidden_states: Tensor, plan: ForwardPlan, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """[B, T, D] to [B, T, D]: `attend`, which the layer's cache calls for each piece."""
        check_arguments(self, kwargs, LAYER_ARGUMENTS)
        return plan.read_kda(self, hidden_states), None

    def attend(
        self,
        hidden_states: Tensor,
        layout: SequenceLayout,
        state: KDAState | None = None,
        state_out: Tensor | None = None,
        cut: int = 0,
    ) -> tuple[Tensor, KDAState | None, KDAState | None]:
        """The layer's equations, for tokens that are read at once.

        Args:
            hidden_states: [B, T, D].
            layout: Their padding and packing.
            state: Before the first token; None starts from zeros and returns no state.
            state_out: Tensor that the next recurrent state may be written to.
            cut: Number of tokens after which the state is returned too; T, or of plain rows.

        Returns:
            [B, T, D], the state after the last token, and that after `cut` tokens.
        """
        before, keeps = state or KDAState(), state is not None and state.is_kept
        inside = cut if cut < hidden_states.shape[1] else 0
        x = layout.pack(hidden_states)  # [1, R, D], or [B, T, D] where rows are plain sequences
        # q, k, v = SiLU(conv(W x)), and the inner halves of two low-rank gates
        projected = convolved_projections(
            x,
            (self.q_proj, self.k_proj, self.v_proj),
            (self.q_conv1d, self.k_conv1d, self.v_conv1d),
            (self.f_a_proj, self.g_a_proj, self.b_proj),
            self.head_dim,
            conv_state=layout.initial_states(before.conv),
            output_state=keeps,
            cut=inside,
            **layout.conv_boundaries(),
        )
        decay, gate, beta = projected.others
        # log decay = -exp(A_log) softplus(g + dt_bias) and sigmoid(beta) are inside the operation
        g, beta = layout.silenced(self._heads(self.f_b_proj(decay)), beta)
        inputs = (projected.q, projected.k, projected.v, g, beta)
        out, recurrent, recurrent_at_cut = kda_attention_and_cut(
            inputs,
            inside,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            initial_state=layout.initial_states(before.entering(inputs)),
            output_final_state=keeps,
            cu_seqlens=layout.cu_seqlens,
            state_out=state_out,
            is_normalised=projected.is_normalised,
        )
        conv_state, conv_at_cut = layout.row_states(projected.conv_state), projected.conv_at_cut
        del inputs, projected, g  # gigabytes, in a long text
        out = self.o_norm(out, self._heads(self.g_b_proj(gate)))  # RMSNorm(o) * sigmoid(gate)
        out = layout.unpack(project(out.flatten(-2), self.o_proj), hidden_states.shape[0])
        after = KDAState(conv_state, layout.row_states(recurrent)) if keeps else None
        return out, after, KDAState(conv_at_cut, recurrent_at_cut) if inside else after

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # in tensor parallelism, some of the heads

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "linear_attn_config['num_heads']", self.num_heads, 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Casting the model to 16 bits moves the decay parameters but leaves them in float32."""
        decay = [x for p in (self.A_log, self.dt_bias) for x in (p, p.grad)]

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_decay = any(tensor is each for each in decay)
            if not is_decay or moved.dtype not in (torch.float16, torch.bfloat16):
                return moved
            return tensor.to(moved.device, torch.float32)

        return super()._apply(keep_wide, recurse)
